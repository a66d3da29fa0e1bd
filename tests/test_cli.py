"""The other commands, as a user types them."""

import json
import re
from pathlib import Path

import pytest
from launch import TRACE, Done, Prepared, launch, launch_rows, snapshot, succeed, summary

from hvdtrain.config import describe_options, recipe_names

PROMPT = "def żółw_日本("
GENERATED = {
    "seed 1": "--seed 1",
    "seed 1 again": "--seed 1",
    "seed 2": "--seed 2",
    "greedy": "--temperature 0",
    "greedy, seed 2": "--temperature 0 --seed 2",
    "one to choose from": "--top-k 1 --temperature 5",
    "nucleus": "--top-p 0.5",
    "beyond the context": "--max-tokens 60 --seed 1",
}
WRONG = {
    "evaluate {empty}": (65, "is not a run folder: it has no config.yaml"),
    "evaluate {trained} --split test": (65, "has no test shards; it has: train, val"),
    "evaluate {trained} --data {empty}": (65, "no shards in"),
    "report {empty}": (65, "is not a run folder: cannot read metrics.jsonl"),
    "generate {empty} --prompt x": (65, "is not a run folder: it has no config.yaml"),
    "generate {trained} --prompt x --top-p 1.5": (2, "--top-p 1.5: input should be less than or equal to 1"),
    "generate {trained} --prompt x --top-p 0": (2, "--top-p 0.0: input should be greater than 0"),
    "generate {trained} --prompt x --temperature -1": (2, "--temperature -1.0: input should be greater"),
    "generate {trained} --prompt x --max-tokens 0": (2, "--max-tokens 0: input should be greater"),
    "generate {trained} --prompt x --temperature hot": (2, "--temperature: invalid float value: 'hot'"),
    "generate {trained}": (2, "the following arguments are required: --prompt"),
}


@pytest.fixture(scope="module")
def rows(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """All of the above, in one process."""
    names = {"trained": trained, "empty": tmp_path_factory.mktemp("empty")}
    lines = {words: words.format_map(names).split() for words in WRONG}
    for name, options in GENERATED.items():
        lines[name] = ["generate", str(trained), "--prompt", PROMPT, "--max-tokens", "12", *options.split()]
    before = snapshot(trained)
    found = dict(zip(lines, launch_rows(lines.values()), strict=True))
    assert snapshot(trained) == before
    return found


@pytest.mark.parametrize("words", WRONG)
def test_wrong_use(rows: dict[str, Done], words: str):
    done, (exit_code, cure) = rows[words], WRONG[words]
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (exit_code, 1, False), done
    assert cure in done.messages[0]


def test_generate(rows: dict[str, Done]):
    texts = {name: rows[name].stdout for name in GENERATED}
    assert {(rows[name].exit_code, rows[name].stderr) for name in GENERATED} == {(0, "")}
    assert all(text.startswith(PROMPT) and len(text) > len(PROMPT) + 1 for text in texts.values())
    assert texts["seed 1"] == texts["seed 1 again"]
    assert texts["greedy"] == texts["greedy, seed 2"] == texts["one to choose from"]
    assert len({texts[name] for name in ("seed 1", "seed 2", "greedy", "nucleus")}) == 4
    assert texts["beyond the context"].startswith(texts["seed 1"].rstrip("\n"))  # 16 tokens; the prompt alone has 13
    assert len(texts["beyond the context"]) > len(texts["seed 1"]) + 20


def test_generate_in_the_locale_of_a_batch_job(rows: dict[str, Done], trained: Path):
    done = succeed("generate", trained, "--prompt", PROMPT, "--max-tokens", 12, "--seed", 1, env={"LC_ALL": "C"})
    assert done.stdout == rows["seed 1"].stdout


def test_generate_is_for_one_process(trained: Path):
    done = launch("generate", trained, "--prompt", "x", how="mpirun", ranks=2)
    assert (done.exit_code, len(done.messages)) == (2, 1), done
    assert "generate works on one process; mpirun started 2" in done.messages[0]


def test_evaluate_gives_the_same_on_any_ranks(prepared: Prepared, trained: Path):
    alone = json.loads(succeed("evaluate", trained).stdout)
    assert (alone["step"], alone["split"], alone["run"]) == (12, "val", str(trained))
    assert alone["val_loss"] == summary(trained)["val_loss"]
    done = succeed("evaluate", trained, how="mpirun", ranks=2)
    assert len(done.stdout.splitlines()) == 1  # rank 0 alone speaks
    on_two = json.loads(done.stdout)
    for key in ("val_loss", "perplexity"):  # fp32 sums of other batches
        assert on_two.pop(key) == pytest.approx(alone.pop(key), rel=1e-6)
    assert on_two == alone


def test_evaluate_other_splits_and_other_data(prepared: Prepared, trained: Path):
    words = ("evaluate", trained, "--data", prepared.shards)
    val, train = (json.loads(done.stdout) for done in launch_rows([words, (*words, "--split", "train")]))
    shards = json.loads((prepared.shards / "manifest.json").read_text(encoding="utf-8"))["shards"]
    for split, found in (("val", val), ("train", train)):
        tokens = sum(shard["tokens"] for shard in shards if shard["split"] == split)
        assert (found["split"], found["target_tokens"]) == (split, tokens - 1)  # the first is nobody's target
    assert train["val_loss"] != val["val_loss"] == summary(trained)["val_loss"]


def test_report(trained: Path, tmp_path: Path):
    picture = tmp_path / "pictures" / "loss.png"
    done = succeed("report", trained, trained, "--out", picture)
    raw = picture.read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(raw) > 10_000
    found = summary(trained)
    head, *table = done.stdout.split("\n\n")[0].splitlines()
    assert head.split()[:4] == ["run", "status", "step", "tokens"]
    cells = [str(trained), "finished", "12", "2,304", f"{found['val_loss']:.4f}", found["sample_digest"]]
    assert len(table) == 2
    assert all(cell in row.split() for cell in cells for row in table)
    assert f"loss curve   {picture}" in done.stdout
    assert f"checkpoint   {trained}/checkpoints/step-00000012" in done.stdout


def test_help():
    done = succeed("--help")
    for name in ("train", "evaluate", "generate", "report", "doctor"):
        assert re.search(rf"^ +{name} +\S", done.stdout, re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", succeed("--version").stdout)


def test_train_help_lists_every_key():
    done = succeed("train", "--help")
    rows = list(describe_options())
    assert len(rows) > 30
    for row in rows:
        shown = re.search(rf"^  {re.escape(row.key)} +(.*(?:\n {{20,}}.*)*)", done.stdout, re.MULTILINE)
        assert shown, row.key
        words = " ".join(shown[1].split())
        assert words.startswith(f"{row.type} {row.default} ")
        assert " ".join(row.meaning.split()) in words
    assert f"recipes: {', '.join(recipe_names())}" in done.stdout


def test_doctor():
    done = succeed("doctor", timeout_s=200)
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert rows.keys() >= {"python", "torch", "CUDA", "MPI", "Horovod", "launchers", "Slurm", "cores", "memory"}
    assert rows["2 ranks, mpirun"].strip() == "all-reduce ok over mpi"
    assert rows["2 ranks, gloo"].strip() == "all-reduce ok over gloo"
    assert "MISSING" not in done.stdout
