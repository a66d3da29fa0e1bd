"""The other commands, as a user types them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import slices_of, tensors_in
from launch import HVDTRAIN, TRACE, Done, Prepared, launch, launch_rows, snapshot, succeed, summary

from hvdtrain import cli
from hvdtrain.checkpoint.retention import folder_of
from hvdtrain.checkpoint.valid import read_progress
from hvdtrain.checkpoint.writer import CheckpointOptions, save
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.config import describe_options, recipe_names
from hvdtrain.watch.log_file import read_log

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
    "generate {trained}": (2, "generate takes --prompt TEXT, or --input FILE and --output FILE"),
    "generate {trained} --prompt x --input y --output z": (2, "generate takes --prompt TEXT, or --input FILE and"),
    "generate {trained} --input nothing --output {empty}": (2, "is there already; remove it, or give another --output"),
    "generate {trained} --input nothing --output {empty}/x": (65, "cannot read nothing: No such file or directory"),
    "generate {trained} --input x --output {empty}/x --n-best 2 --beam 2": (2, "a line of text holds one answer; take"),
    "generate {trained} --prompt x --n-best 2": (2, "n_best=2 hypotheses of beam=1; raise beam, or lower n_best"),
    "evaluate {trained} --input x": (2, "--input and --reference go together"),
    "evaluate {trained} --input x --reference y --split val": (2, "--input is instead of --split and --data"),
    "evaluate {trained} --input x --reference y": (2, "task.name=lm compares no texts with references"),
    "evaluate {trained} --scores bleu": (2, "task.name=lm compares no texts with references"),
    "evaluate {trained} --weights ema": (2, "step-00000012 has no averaged weights (ema.decay was 0); take --weights"),
    "generate {trained} --prompt x --weights ema": (2, "step-00000012 has no averaged weights"),
    "evaluate {trained} --weights best": (2, "argument --weights: invalid choice: 'best'"),
    "export {empty} --out {empty}/out": (65, "is not a run folder: it has no config.yaml"),
    "export {trained}": (2, "the following arguments are required: --out"),
    "export {trained} --out {trained}": (2, "is there already, and not an empty folder; remove it, or give another"),
    "export {trained} --out {empty}/out --dtype int8": (2, "argument --dtype: invalid choice: 'int8'"),
    "export {trained} --out {empty}/out --checkpoint 7": (2, "has no checkpoint of step 7; there: 6, 12"),
    "average {empty} --last 2": (65, "is not a run folder: it has no config.yaml"),
    "average {trained}": (2, "the following arguments are required: --last"),
    "average {trained} --last 0": (2, "--last 0: give the number of checkpoints to average, 1 or more"),
    "average {trained} --last 2 --out {empty}": (2, "is there already; remove it, or give another --out DIR"),
    "average {trained} --last 3": (
        2,
        "has 2 whole checkpoints (step 12, 6), not --last 3; the run keeps no more than checkpoint.keep_last=2: "
        "set it to 3 or 0 (all) for the next; or give --last 2",
    ),
}
EVALUATED = (
    "evaluate {trained}",
    "evaluate {trained} --checkpoint 12",
    "evaluate {trained} --data {shards}",
    "evaluate {trained} --data {shards} --split train",
)


@pytest.fixture(scope="module")
def rows(prepared: Prepared, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """All of the above, in one process."""
    names = {"trained": trained, "shards": prepared.shards, "empty": tmp_path_factory.mktemp("empty")}
    lines = {words: words.format_map(names).split() for words in (*WRONG, *EVALUATED)}
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


def test_generate_on_two_ranks(rows: dict[str, Done], trained: Path):
    done = succeed("generate", trained, "--prompt", PROMPT, "--max-tokens", 12, "--seed", 1, how="mpirun", ranks=2)
    assert done.stdout == rows["seed 1"].stdout


def evaluated(done: Done) -> dict[str, Any]:
    assert done.exit_code == 0, done
    return json.loads(done.stdout)


def test_evaluate_gives_the_same_on_any_ranks(rows: dict[str, Done], trained: Path):
    alone = evaluated(rows["evaluate {trained}"])
    assert (alone["step"], alone["split"], alone["run"]) == (12, "val", str(trained))
    assert alone["val_loss"] == summary(trained)["val_loss"]
    done = succeed("evaluate", trained, how="mpirun", ranks=2)
    assert len(done.stdout.splitlines()) == 1  # rank 0 alone speaks
    on_two = json.loads(done.stdout)
    assert min(on_two.pop("wall_s"), alone.pop("wall_s")) > 0
    for key in ("val_loss", "perplexity"):  # fp32 sums of other batches
        assert on_two.pop(key) == pytest.approx(alone.pop(key), rel=1e-6)
    assert on_two == alone


def test_evaluate_takes_the_checkpoint_that_is_asked_for(rows: dict[str, Done], trained: Path):
    found = evaluated(rows["evaluate {trained} --checkpoint 12"])
    assert (found["step"], found["val_loss"]) == (12, summary(trained)["val_loss"])
    done = launch("evaluate", trained, "--checkpoint", "best", how="mpirun", ranks=2)
    assert (done.exit_code, len(done.messages)) == (2, 1), done
    assert f"{trained} has no best checkpoint" in done.messages[0]


def test_evaluate_other_splits_and_other_data(rows: dict[str, Done], prepared: Prepared, trained: Path):
    val, train = (evaluated(rows[f"evaluate {{trained}} --data {{shards}}{words}"]) for words in ("", " --split train"))
    shards = json.loads((prepared.shards / "manifest.json").read_text(encoding="utf-8"))["shards"]
    for split, found in (("val", val), ("train", train)):
        tokens = sum(shard["tokens"] for shard in shards if shard["split"] == split)
        assert (found["split"], found["target_tokens"]) == (split, tokens - 1)  # the first is nobody's target
    assert train["val_loss"] != val["val_loss"] == summary(trained)["val_loss"]


@pytest.fixture(scope="module")
def with_ema(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, as if the average of its weights at step 12 were those of step 6: scores and text of both are known."""
    run_dir = tmp_path_factory.mktemp("with_ema") / "run"
    shutil.copytree(trained, run_dir)
    older = {f"ema.{name.removeprefix('model.')}": t for name, t in tensors_in(folder_of(run_dir, 6), "model.").items()}
    last = folder_of(run_dir, 12)
    tensors, progress = {**tensors_in(last, ""), **older, "ema_began": torch.tensor(0)}, read_progress(last)
    shutil.rmtree(last)
    save(run_dir, slices_of(tensors), progress, LocalGroup(), CheckpointOptions(keep_last=1))
    return run_dir


def test_averaged_weights_are_taken_where_they_are(with_ema: Path, trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "older")
    shutil.rmtree(folder_of(tmp_path / "older", 12))
    prompt = ("--prompt", PROMPT, "--temperature", 0)
    choices: dict[str, tuple] = {"": (), "ema": ("--weights", "ema"), "raw": ("--weights", "raw")}
    done = launch_rows(
        [
            *(("evaluate", with_ema, *words) for words in choices.values()),
            *(("generate", with_ema, *prompt, *words) for words in choices.values()),
            ("generate", tmp_path / "older", *prompt),
            ("generate", trained, *prompt, "--weights", "raw"),
        ]
    )
    assert {one.exit_code for one in done} == {0}
    scores, texts = done[:3], done[3:]
    logged = {line["step"]: line["val_loss"] for line in read_log(trained / "metrics.jsonl") if line["kind"] == "eval"}
    found = [json.loads(done.stdout) for done in scores]
    assert [line["weights"] for line in found] == ["ema", "ema", "raw"]
    assert [line["val_loss"] for line in found] == [logged[6], logged[6], logged[12]]
    assert logged[6] != logged[12]
    by_default, ema, raw, at_6, at_12 = texts
    assert by_default.stdout == ema.stdout == at_6.stdout
    assert raw.stdout == at_12.stdout
    assert by_default.messages == ema.messages == ["hvdtrain: step 12, averaged weights (ema)"]
    assert raw.stderr == at_12.stderr == ""


def test_evaluate_averaged_weights_on_two_ranks(with_ema: Path):
    alone = json.loads(succeed("evaluate", with_ema).stdout)
    on_two = json.loads(succeed("evaluate", with_ema, how="mpirun", ranks=2).stdout)
    del on_two["wall_s"], alone["wall_s"]
    for key in ("val_loss", "perplexity"):  # fp32 sums of other batches
        assert on_two.pop(key) == pytest.approx(alone.pop(key), rel=1e-6)
    assert on_two == alone


def test_average(prepared: Prepared, trained: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    made = run_dir / "average-2"
    average, again, evaluate, generate, train = launch_rows(
        [
            ("average", run_dir, "--last", 2),
            ("average", run_dir, "--last", 2),
            ("evaluate", made),
            ("generate", made, "--prompt", PROMPT),
            ("train", prepared.recipe, "train.steps=20", "--run-dir", made),
        ]
    )
    assert (average.exit_code, average.stderr) == (0, "")
    assert average.stdout == f"averaged the weights of steps 12, 6 into {made}\n"
    assert (again.exit_code, len(again.messages)) == (2, 1)
    assert f"{made} is there already" in again.messages[0]
    scores = json.loads(evaluate.stdout)
    assert (scores["step"], scores["weights"], scores["run"]) == (12, "raw", str(made))
    logged = [line["val_loss"] for line in read_log(trained / "metrics.jsonl") if line["kind"] == "eval"]
    assert min(logged) - 0.1 < scores["val_loss"] < max(logged)
    assert scores["val_loss"] not in logged
    assert generate.stdout.startswith(PROMPT)
    assert (train.exit_code, len(train.messages), TRACE in train.text) == (65, 1, False), train
    assert "is the average of steps 12, 6, without optimizer state" in train.messages[0]


def test_average_is_for_one_process(trained: Path, tmp_path: Path):
    done = launch("average", trained, "--last", 2, "--out", tmp_path / "out", how="mpirun", ranks=2)
    assert (done.exit_code, len(done.messages)) == (2, 1), done
    assert "average works on one process; mpirun started 2" in done.messages[0]
    assert not (tmp_path / "out").exists()


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
    for name in ("train", "evaluate", "generate", "average", "plan", "sweep", "report", "doctor", "submit", "status"):
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


@pytest.mark.parametrize(
    ("words", "matters"),
    [
        ("train demo", True), ("evaluate runs/x", True), ("submit demo --nodes 2", True), ("doctor --job", True),
        ("doctor", False), ("plan demo --ranks 4", False), ("status runs/x", False), ("report runs/x", False),
        ("train --help", False), ("--version", False), ("", False),
    ],
)  # fmt: skip
def test_whether_it_matters_who_started_a_command(words: str, matters: bool):
    """Under a launcher that cannot be joined, what only looks still answers; submit would queue a job for each rank."""
    assert cli.works_on_ranks(words.split()) == matters


def test_doctor():
    """Also where a launcher that cannot be joined has left its marks: it says so, and looks at all else. It finds what
    is beside its Python, and allows mpirun to start for root.
    """
    allowed = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    program = ("env", *(f"--unset={name}" for name in allowed), "PATH=/usr/bin:/bin", *HVDTRAIN)
    done = succeed("doctor", timeout_s=200, program=program, env={"RANK": "0", "WORLD_SIZE": "4"})
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert rows.keys() >= {"python", "torch", "CUDA", "MPI", "Horovod", "launchers", "Slurm", "cores", "memory"}
    all_four, all_three = "all-reduce, all-to-all, all-gather, broadcast", "sums, parts and messages of an axis"
    assert rows["2 ranks, mpirun"].strip() == f"{all_four} ok over mpi; {all_three} ok over shared memory"
    assert rows["2 ranks, gloo"].strip() == f"{all_four} ok over gloo; {all_three} ok over gloo"
    assert rows["ranks"].startswith("REFUSED: torchrun started 4 ranks")
    assert "MISSING" not in done.stdout
