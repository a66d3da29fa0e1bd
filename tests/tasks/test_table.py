"""A task is one file and one line in the table: nobody else names one, or asks a model or a batch for its class."""

import ast
from pathlib import Path

import pytest
from pydantic import create_model

from hvdtrain import config as configs
from hvdtrain.config import RunConfig, describe_options, load_config
from hvdtrain.data.batch import Batch
from hvdtrain.models.decoder import Decoder
from hvdtrain.options import Options, option
from hvdtrain.planner.estimate import plan
from hvdtrain.sizing import feed_of
from hvdtrain.tasks import TASKS, make_task, options_of
from hvdtrain.tasks.lm import LanguageModel

PACKAGE = Path(__file__).resolve().parents[2] / "hvdtrain"
MODELS = {
    "Decoder",
    "Encoder",
    "MaskedLanguageModel",
    "Classifier",
    "SpanModel",
    "Seq2Seq",
    "Block",
    "CrossBlock",
    "Attention",
    "CrossAttention",
}
BATCHES = {"Batch", "MaskedBatch", "PairBatch", "LabelBatch", "SpanBatch"}


class EchoOptions(Options):
    times: int = option(2, "how often", ge=1)


class Echo(LanguageModel):
    name = "echo"
    about = "say it again"
    options = EchoOptions

    def __init__(self, options: EchoOptions):
        super().__init__()
        self.times = options.times

    def training_flops(self, model: Decoder, batch: Batch) -> int:
        return self.times * super().training_flops(model, batch)


@pytest.fixture
def with_echo(monkeypatch: pytest.MonkeyPatch) -> type[RunConfig]:
    """The package as it would be with one more line in the table."""
    monkeypatch.setitem(TASKS, "echo", Echo)
    options = options_of(TASKS)
    whole = create_model("RunConfig", __base__=RunConfig, task=(options, options()))
    monkeypatch.setattr(configs, "RunConfig", whole)
    return whole


def test_a_line_in_the_table_gives_a_task_its_options_and_their_description(with_echo: type[RunConfig]):
    rows = {row.key: row for row in describe_options(with_echo)}
    assert rows["task.name"].type == "|".join(TASKS) == "lm|mlm|seq2seq|classify|span_qa|echo"
    assert "; classify: a text's label; " in rows["task.name"].meaning
    assert rows["task.name"].meaning.endswith("; echo: say it again")
    assert (rows["task.echo.times"].type, rows["task.echo.times"].default) == ("int", "2")
    task = make_task(load_config("demo", ["task.name=echo", "task.echo.times=3"]).task)
    assert (type(task), task.times) == (Echo, 3)


@pytest.mark.usefixtures("with_echo")
def test_a_task_of_the_table_is_sized_and_planned_like_the_others():
    config = load_config("demo", ["task.name=echo", "train.global_tokens=512", "train.ramp_start=2"])
    with pytest.raises(configs.ConfigError, match=r"train\.ramp_increment=0 does not lead from train\.ramp_start=2"):
        feed_of(config, 0, 1)
    # The same model as a language model's, and twice its FLOPs.
    printed = {name: plan("demo", [f"task.name={name}", "data.dir=nowhere"], 2, 0, 300) for name in ("lm", "echo")}
    flops = {
        name: float(next(line for line in text.splitlines() if "model FLOPs" in line).split()[2])
        for name, text in printed.items()
    }
    assert flops["echo"] == pytest.approx(2 * flops["lm"], abs=0.1)


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def asks_for_a_class(node: ast.AST) -> bool:
    """``isinstance(model, Decoder)``, ``isinstance(batch, PairBatch)``"""
    is_call = isinstance(node, ast.Call) and names_in(node.func) == {"isinstance"}
    return is_call and bool(names_in(node.args[1]) & (MODELS | BATCHES))


def names_a_task(node: ast.AST) -> bool:
    """``config.task.name == "lm"``, ``{"lm": 4, "seq2seq": 3}[config.task.name]``"""
    if isinstance(node, ast.Compare):
        return any(ast.unparse(side).endswith("task.name") for side in (node.left, *node.comparators))
    is_picked = isinstance(node, ast.Subscript) and ast.unparse(node.slice).endswith("task.name")
    return is_picked and names_in(node.value) != {"TASKS"}


def test_nobody_names_a_task_or_asks_a_model_or_a_batch_for_its_class():
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if asks_for_a_class(node) or names_a_task(node)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("isinstance(batch, LabelBatch)", True),
        ("isinstance(module, Attention | CrossAttention)", True),
        ("isinstance(part, torch.Tensor)", False),
        ("run.config.task.name != 'lm'", True),
        ("{'lm': 4, 'seq2seq': 3}[config.task.name]", True),
        ("TASKS[config.task.name].rows_are_alike", False),
        ("f'{config.task.name}'", False),
    ],
)
def test_the_check_finds(line: str, is_wrong: bool):
    assert any(asks_for_a_class(node) or names_a_task(node) for node in ast.walk(ast.parse(line))) == is_wrong
