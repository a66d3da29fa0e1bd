"""RunConfig: every room's Options in one strict tree, from a YAML recipe plus dotted overrides.

    python -m hvdtrain train demo optim.lr=3e-4 model.layers=8

An unknown key, a wrong type or an impossible value is one ConfigError that names the key and what is valid.
"""

import difflib
import json
import re
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from hvdtrain.checkpoint.origin import ModelOptions, model_under
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.horovod_group import TOPOLOGIES
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.cut.options import CutOptions
from hvdtrain.data.corpora import DataOptions
from hvdtrain.errors import ConfigError
from hvdtrain.files import read_text
from hvdtrain.models.recompute import RecomputeOptions
from hvdtrain.optim.ema import EmaOptions
from hvdtrain.optim.guard import GuardOptions
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.optim.scaling import ScalingOptions
from hvdtrain.optim.schedules import Length, ScheduleOptions, check_schedule
from hvdtrain.options import Options, option
from hvdtrain.strict_yaml import parse_yaml
from hvdtrain.sync import SyncOptions
from hvdtrain.tasks import TaskOptions
from hvdtrain.watch.balance import BalanceOptions
from hvdtrain.watch.metrics import MetricsOptions
from hvdtrain.watch.stopping import StopOptions
from hvdtrain.watch.watchdog import WatchdogOptions


class TrainOptions(Options):
    steps: int = option(1000, "optimizer updates of the whole run", ge=1)
    tokens: int = option(0, "tokens of the whole run, padding counted, instead of steps; 0: not given", ge=0)
    epochs: float = option(0.0, "epochs of the whole run instead of steps; 0: not given", ge=0)
    global_batch: int = option(32, "sequences of one update, over all ranks", ge=1)
    global_tokens: int = option(
        0, "tokens of one update, padding counted, instead of global_batch; 0: global_batch x model.context", ge=0
    )
    microbatch: int = option(0, "sequences of one forward pass on a rank; 0: all of the rank's", ge=0)
    ramp_start: int = option(0, "sequences of the first updates, of a batch that grows within the run; 0: fixed", ge=0)
    ramp_increment: int = option(0, "sequences by which it grows, until it is the whole batch", ge=0)
    ramp_tokens: int = option(0, "tokens over which it grows", ge=0)


class EvalOptions(Options):
    every: int = option(250, "steps between evaluations; 0: only at the end", ge=0)
    rows: int = option(32, "sequences of one forward pass in evaluation", ge=1)


class RunConfig(Options):
    seed: int = option(1, "of weights, data order and dropout", ge=0, lt=1 << 63)
    precision: Literal["fp32", "bf16", "bf16-weights", "fp16"] = option(
        "fp32", "of matrix products; bf16, fp16: autocast; bf16-weights: a bf16 copy of the fp32 weights computes"
    )
    tf32: bool = option(False, "let fp32 products on NVIDIA GPUs round their inputs to TF32")
    compile: Literal["none", "blocks", "model"] = option("none", "torch.compile, each block by itself or all at once")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: a GPU per rank where there is one")
    data: DataOptions = DataOptions()
    train: TrainOptions = TrainOptions()
    eval: EvalOptions = EvalOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    metrics: MetricsOptions = MetricsOptions()
    model: ModelOptions = ModelOptions()
    recompute: RecomputeOptions = RecomputeOptions()
    task: TaskOptions = TaskOptions()
    optim: OptimOptions = OptimOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    scaling: ScalingOptions = ScalingOptions()
    guard: GuardOptions = GuardOptions()
    ema: EmaOptions = EmaOptions()
    mesh: MeshOptions = MeshOptions()
    cut: CutOptions = CutOptions()
    sync: SyncOptions = SyncOptions()
    balance: BalanceOptions = BalanceOptions()
    stop: StopOptions = StopOptions()
    watchdog: WatchdogOptions = WatchdogOptions()

    def replicas_of(self, ranks: int) -> int:
        """How many replicas train on so many ranks. Errors: ConfigError where they are no whole number, or none."""
        return self.mesh.replicas_of(self.sync.workers_of(ranks))

    def identity(self) -> dict[str, Any]:
        """The settings that make a run what it is: a resumed run must share them. Those that may change (length,
        microbatch, how often to log, where the data lies) are left out; the data's digest is added by the loop.
        """
        whole = flatten(self.model_dump())
        may_change = re.compile(
            r"device|tf32|compile|optim\.muon\.(precision|share)|model\.(from|from_weights)|task\.\w+\.(scores|search\..*)|train\.(steps|tokens|epochs|microbatch)|(data|eval|checkpoint|metrics|mesh|cut|sync|balance|recompute|ema|stop|watchdog)\..*"
        )
        return {key: value for key, value in whole.items() if not may_change.fullmatch(key)}


_MOST_PROBLEMS = 20  # told at once
_MOST_SHOWN = 300  # characters of a wrong value

# --- reading -----------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    files = resources.files("hvdtrain") / "recipes"
    return sorted(Path(file.name).stem for file in files.iterdir() if file.name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """The YAML of a built-in recipe, or of a file where ``recipe`` is a path (it has a slash or ends in .yaml)."""
    if "/" in recipe or recipe.endswith((".yaml", ".yml")):
        try:
            return read_text(Path(recipe))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read recipe file {recipe}: {getattr(error, 'strerror', error)}") from None
    if recipe not in recipe_names():
        raise ConfigError(
            f"no recipe {recipe!r}; there are: {', '.join(recipe_names())}; or give a path to a .yaml file"
        )
    return (resources.files("hvdtrain") / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")


def run_folders(recipe: str, run_dir: Path | None = None, resume: str = "auto") -> list[Path]:
    """Where a run of the recipe is kept (default: ``runs/RECIPE``), and the other run that ``resume`` may name."""
    kept = run_dir or Path("runs") / Path(recipe).stem
    return [kept] if resume in ("auto", "never") else [kept, Path(resume)]


def may_cut(recipe: str, overrides: Sequence[str]) -> bool:
    """Do these settings speak of a mesh? Asked before the ranks have met (local; a recipe that cannot be read does not,
    and is refused later).
    """
    try:
        text = recipe_text(recipe)
    except ConfigError:
        text = ""
    return any("mesh" in words for words in (text, *overrides))


def topology_of(recipe: str, overrides: Sequence[str]) -> str:
    """``sync.allreduce.topology`` of these settings, which Horovod has to know when it starts. Asked before the ranks
    have met (local; what cannot be read is flat, and refused later).
    """
    try:
        found: Any = _tree(recipe, overrides)
    except ConfigError:
        return "flat"
    for key in ("sync", "allreduce", "topology"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) and found in TOPOLOGIES else "flat"


def load_config(recipe: str, overrides: Sequence[str] = (), run_dirs: Sequence[Path] = ()) -> RunConfig:
    """A recipe's settings with ``key=value`` overrides on top, and under both the shape that ``model.from`` brings.

    run_dirs: of a run that may go on (see ``run_folders``): it knows what ``model.from`` brought.
    Errors: ConfigError, one message for all that is wrong; CheckpointError for a ``model.from`` that cannot be read.
    """
    tree = _tree(recipe, overrides)
    if isinstance(tree.get("model"), dict):
        tree["model"] = model_under(tree["model"], run_dirs)
    return make_config(tree, f"recipe {recipe}")


def make_config(tree: dict[str, Any], origin: str) -> RunConfig:
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        problems = [_explain(problem) for problem in found[:_MOST_PROBLEMS]]
        problems += [f"and {len(found) - _MOST_PROBLEMS} more"] if len(found) > _MOST_PROBLEMS else []
        raise ConfigError(f"{origin}: " + "; ".join(problems)) from None
    _check_lengths(config)
    return config


def _check_lengths(config: RunConfig) -> None:
    """Those that depend on neither corpus nor ranks now; the others once these are known."""
    train, scaling = config.train, config.scaling
    schedule = config.schedule
    open_ends = (train.tokens, train.epochs, schedule.warmup_tokens, schedule.warmup_epochs)
    base, own = scaling.base_tokens or scaling.base_batch * config.model.context, train.global_tokens
    at_base = base == (own or train.global_batch * config.model.context) and schedule.warmup != "constant"
    is_scaled = scaling.per_rank or (not at_base if base else scaling.rule != "none")
    Length("train.", train.steps, train.tokens, train.epochs)
    check_schedule(schedule, config.optim.lr, None if is_scaled or any(open_ends) else train.steps)


def dump_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)


def _tree(recipe: str, overrides: Sequence[str]) -> dict[str, Any]:
    """What is written, of any keys. Errors: ConfigError."""
    tree = parse_yaml(recipe_text(recipe), f"recipe {recipe}")
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {recipe} must be a mapping of keys to values, not {type(tree).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected key=value (like optim.lr=3e-4), got {override!r}")
        _set(tree, key, parse_yaml(text, f"value of {key}"))
    return tree


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"unknown key {key!r}: {parent} is a single value, not a group of keys")
        tree = child
    tree[last] = value


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    given = _shown(problem["input"])
    if problem["type"] == "extra_forbidden":
        valid = [row.key for row in describe_options()]
        close = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
        room = key.rpartition(".")[0]
        depth = key.count(".") + 1
        inside = [name.split(".") for name in valid if not room or name.startswith(f"{room}.")]
        siblings = dict.fromkeys(".".join(parts[:depth]) for parts in inside)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"unknown key {key!r}; {hint}valid here: {', '.join(siblings)}"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    return f"{key}={given}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # a number of thousands of digits
        text = f"({type(value).__name__})"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


# --- describing --------------------------------------------------------------------------------------------------


class OptionRow(typing.NamedTuple):
    key: str
    type: str
    default: str
    meaning: str


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def describe_options(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[OptionRow]:
    """Every option, in order: dotted key, type, default, meaning with unit."""
    for name, field in model.model_fields.items():
        key, kinds = f"{prefix}{field.alias or name}", typing.get_args(field.annotation) or (field.annotation,)
        if group := next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None):
            yield from describe_options(group, f"{key}.")
            continue
        default = "required" if field.default is PydanticUndefined else str(field.default).lower() or "none"
        yield OptionRow(key, _kind(field.annotation), default, field.description or "")


def _kind(annotation: Any) -> str:
    """``float``, ``map``, ``list``, or the values that there are: ``none|balanced|list``."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (dict, list):
        return {dict: "map", list: "list"}[origin]
    if origin is Literal:
        return "|".join(map(str, parts))
    return "|".join(map(_kind, parts)) if parts else annotation.__name__.removesuffix("Type").lower()
