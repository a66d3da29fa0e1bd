"""``hvdtrain status``: runs in every state, from the files of real ones, of made-up ones and of damaged ones."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import until
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import HVDTRAIN, Prepared, environment, launch, summary

from hvdtrain.errors import CheckpointError
from hvdtrain.jobs.slurm import Queued
from hvdtrain.jobs.status import Status, read_tail, span, status, status_of
from hvdtrain.watch.log_file import read_log

NOW = 1_900_000_000.0
NODE = socket.gethostname().partition(".")[0]
STATES = {"waiting", "running", "stopped", "finished", "failed"}
RUNS = {"7": Queued("RUNNING", "None")}
WAITS = {"7": Queued("PENDING", "Priority")}


def write_run(
    folder: Path,
    jobs: dict[str, dict] | None = None,
    steps_logged: tuple[int, ...] = (1, 10, 20),
    age_s: float = 30,
    finished_at: int | None = None,
    submitted: str | None = None,
) -> Path:
    """A run of 100 steps, logged every 10, 2 s a step after a start-up of 50 s; it last wrote ``age_s`` ago."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 100, tokens: 0, epochs: 0.0}\nscaling: {base_batch: 0}\n")
    lines = [
        {"kind": "train", "step": n, "loss": 5 - n / 100, "tokens_per_s": 1000.0 + n, "wall_s": 50.0 + 2 * n}
        for n in steps_logged
    ]
    lines.insert(2, {"kind": "eval", "step": 10, "val_loss": 4.5})
    if steps_logged:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.utime(folder / "metrics.jsonl", (NOW - age_s, NOW - age_s))
        manifest = folder / "checkpoints" / "step-00000010" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        os.utime(manifest, (NOW - age_s - 20, NOW - age_s - 20))
        (folder / "checkpoints" / "step-00000020").mkdir()  # not whole
        (folder / "checkpoints" / ".step-00000020.partial").mkdir()
    for number, (name, fields) in enumerate((jobs or {}).items()):
        (folder / "jobs" / name).mkdir(parents=True)
        started = {"started": f"2030-03-17T17:{number:02}:00+00:00"}  # NOW is 17:46:40
        (folder / "jobs" / name / "job.json").write_text(json.dumps({**started, **fields}))
    if submitted is not None:
        (folder / "jobs").mkdir(exist_ok=True)
        (folder / "jobs" / "submit-1.json").write_text(json.dumps({"job_id": submitted}))
    if finished_at is not None:
        fields = {"status": "finished", "step": finished_at, "tokens_per_s": 999.0}
        (folder / "summary.json").write_text(json.dumps(fields))
    return folder


# --- made-up ones -------------------------------------------------------------------------------------------------


def test_a_running_one_in_full(tmp_path: Path):
    before = {
        "job_id": "7",
        "world_size": 4,
        "ended": "2030-03-17T17:30:00+00:00",
        "exit_code": 75,
        "reason": "SIGUSR2",
    }
    run = write_run(tmp_path / "run", {"7-0": before, "7-1": {"job_id": "7"}})
    assert status_of(run, RUNS, NOW) == Status(
        run_dir=str(run),
        state="running",
        why="",
        job_id="7",
        step=20,
        steps=100,
        loss=4.8,
        val_loss=4.5,
        tokens_per_s=1020.0,
        left_s=80 * 2.0 - 30,  # since its last line it has gone on
        line_age_s=30.0,
        restarts=1,
        checkpoint_step=10,
        checkpoint_age_s=50.0,
        exit_code=None,
        reason="",
    )


ENDED = {"ended": "2030-03-17T17:30:00+00:00"}
STOPPED, CRASHED, DONE = ({**ENDED, "exit_code": code} for code in (75, 70, 0))
LOCAL = "20300317-170000-"  # the name of a record without Slurm, but for the process
GONE = {"nodes": {NODE: [0]}}
CASES = {
    "in the queue, never begun": ({"submitted": "7", "steps_logged": ()}, WAITS, "waiting", "pending: Priority"),
    "submitted, nobody to ask": ({"submitted": "7", "steps_logged": ()}, None, "waiting", "there is no squeue here"),
    "submitted, then cancelled": ({"submitted": "7", "steps_logged": ()}, {}, "stopped", "job 7 is not in the queue"),
    "started, no line yet": ({"submitted": "7", "steps_logged": ()}, RUNS, "running", ""),
    "requeued": ({"jobs": {"7-0": STOPPED}}, WAITS, "waiting", "pending: Priority"),
    "requeued, the next starts": ({"jobs": {"7-0": STOPPED}, "age_s": 9e5}, RUNS, "running", ""),
    "runs": ({"jobs": {"7-0": {}}}, RUNS, "running", ""),
    "runs, but hangs": ({"jobs": {"7-0": {}}, "age_s": 7200}, RUNS, "running", "silent for 47 min"),
    "configuring": ({"jobs": {"7-0": STOPPED}}, {"7": Queued("CONFIGURING", "")}, "running", "configuring"),
    "stopped": ({"jobs": {"7-0": STOPPED}}, {}, "stopped", ""),
    "interrupted": ({"jobs": {"x": {**ENDED, "exit_code": 130}}}, None, "stopped", ""),
    "crashed": ({"jobs": {"7-0": STOPPED, "8-0": CRASHED}}, {}, "failed", ""),
    "crashed first": ({"jobs": {"8-0": CRASHED, "7-0": STOPPED}}, {}, "stopped", ""),
    "killed": ({"jobs": {"7-0": {}}}, {}, "failed", "its job is gone and has not said why"),
    "its queue is elsewhere": ({"jobs": {"7-0": {}}}, None, "running", ""),
    "silent, its queue is elsewhere": ({"jobs": {"7-0": {}}, "age_s": 7200}, None, "failed", "silent for 47 min"),
    "another machine": ({"jobs": {f"{LOCAL}1": {"nodes": {"far": [0]}}}}, {}, "running", ""),
    "process is gone": ({"jobs": {f"{LOCAL}4194305": GONE}}, {}, "failed", "its job is gone"),
    "process is another's": ({"jobs": {f"{LOCAL}1": GONE}}, {}, "failed", "its job is gone"),
    "record of a year 1": ({"jobs": {"7-0": {"started": "0001-01-01T00:00:00"}}}, RUNS, "running", ""),
    "record of yesterday": ({"jobs": {"7-0": {"started": "yesterday"}}}, RUNS, "running", ""),
    "record is damaged": ({"jobs": {"7-0": {"started": 5, "nodes": 3}}}, {}, "failed", "its job is gone"),
    "finished": ({"jobs": {"7-0": DONE}, "finished_at": 20}, {}, "finished", ""),
    "finished, without a record": ({"finished_at": 20}, None, "finished", ""),
    "finished, the job is about to end": ({"jobs": {"7-0": DONE}, "finished_at": 20}, RUNS, "finished", ""),
    "finished once, now goes on": ({"jobs": {"6-0": DONE, "7-0": {}}, "finished_at": 10}, RUNS, "running", ""),
    "finished, has just gone on": ({"jobs": {"6-0": DONE, "7-0": {}}, "finished_at": 20}, RUNS, "running", ""),
    "finished, waits to go on": (
        {"jobs": {"6-0": DONE}, "submitted": "7", "finished_at": 20},
        WAITS,
        "waiting",
        "pend",
    ),
    "went on after its end": ({"finished_at": 10, "age_s": 9e5}, None, "stopped", "silent for 10 d"),
    "no record, fresh lines": ({}, None, "running", ""),
    "no record, old lines": ({"age_s": 7200}, None, "stopped", "silent for 2 h 00 min"),
    "config alone": ({"steps_logged": ()}, None, "stopped", ""),
}


@pytest.mark.parametrize("name", CASES)
def test_states(name: str, tmp_path: Path):
    files, queue, state, why = CASES[name]
    found = status_of(write_run(tmp_path / "run", **files), queue, NOW)
    assert found.state == state
    assert found.why.startswith(why) or why in found.why
    assert bool(found.why) == bool(why)
    assert (found.left_s is None) == (state == "finished" or not files.get("steps_logged", True))
    assert found.steps == (20 if state == "finished" else 100)


def test_what_is_left_of_one_that_does_not_run_counts_from_its_checkpoint(tmp_path: Path):
    found = status_of(write_run(tmp_path / "run", {"7-0": CRASHED}, age_s=9000), {}, NOW)
    assert (found.step, found.left_s, found.exit_code) == (20, 90 * 2.0, 70)


def test_a_stop_file_is_told(tmp_path: Path):
    run = write_run(tmp_path / "run", {"7-0": STOPPED})
    (run / "stop").touch()
    assert status_of(run, {}, NOW).why == f"remove {run}/stop to let it go on"


def test_heartbeats_are_signs_of_life(tmp_path: Path):
    run = write_run(tmp_path / "run", age_s=7200)
    (run / "heartbeats").mkdir()
    (run / "heartbeats" / "rank-00000.json").touch()
    os.utime(run / "heartbeats" / "rank-00000.json", (NOW - 5, NOW - 5))
    assert status_of(run, None, NOW).state == "running"


def test_the_length_of_a_run(tmp_path: Path):
    """As the job says, else the recipe's; where that is of another batch or in tokens, of the job's ranks."""
    run = write_run(tmp_path / "run", {"7-0": {"steps": 60}})
    assert status_of(run, RUNS, NOW).steps == 60
    run = write_run(tmp_path / "scaled", {"7-0": {"world_size": 4}})
    config = "train: {steps: 100, global_batch: 8, tokens: %d}\nmodel: {context: 16}\nscaling: {per_rank: true}\n"
    (run / "config.yaml").write_text(config % 0)
    assert status_of(run, RUNS, NOW).steps == 25
    (run / "config.yaml").write_text(config % (8 * 16 * 4 * 40))
    assert status_of(run, RUNS, NOW).steps == 40
    (run / "config.yaml").write_text(config.replace("per_rank: true", "base_batch: 4") % 0)
    assert status_of(run, RUNS, NOW).steps == 50
    (run / "config.yaml").write_text("train: {steps: 100, epochs: 2.0}\n")
    assert status_of(run, RUNS, NOW).steps is None
    (run / "config.yaml").write_text("train: [")
    assert (status_of(run, RUNS, NOW).steps, status_of(run, RUNS, NOW).left_s) == (None, None)


def test_the_speed_is_that_of_the_process_that_wrote_last(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        for step, wall_s in ((21, 10.0), (30, 55.0), (40, 105.0)):
            file.write(json.dumps({"kind": "train", "step": step, "wall_s": wall_s}) + "\n")
    os.utime(run / "metrics.jsonl", (NOW, NOW))
    assert status_of(run, None, NOW).left_s == 60 * 5.0


def test_what_is_no_number_is_not_known(tmp_path: Path):
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": Infinity}\n{"kind": "train", "step": 30, "loss": NaN, "wall_s": 1e400}\n')
        file.write('{"kind": "train", "step": true}\n{"kind": "eval", "step": 30, "val_loss": "low"}\n')
    found = status_of(run, None, NOW)
    assert (found.step, found.loss, found.val_loss) == (30, 4.8, 4.5)


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    line = '{{"kind": "train", "step": {}, "loss": 1.0}}\n'
    path.write_text("".join(line.format(number) for number in range(30000)) + '{"kind": "train", "step": 30000')
    found = read_tail(path)
    assert found[-1]["step"] == 29999
    assert [one["step"] for one in found] == list(range(30000 - len(found), 30000))
    assert len(found) * len(line) < 1 << 20
    assert [one["step"] for one in read_tail(path, size=110)] == [29999]


# --- what is printed ----------------------------------------------------------------------------------------------


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("time.time", lambda: NOW)
    monkeypatch.setattr("hvdtrain.jobs.status.ask_queue", lambda ids: {"9": Queued("PENDING", "Resources")})
    monkeypatch.chdir(tmp_path)
    a = write_run(Path("a"), {"7-0": {**CRASHED, "reason": "RankLostError"}}, age_s=90)
    b = write_run(Path("b"), steps_logged=(), submitted="9")
    assert status([a, b]).splitlines() == [
        "run  state    step    loss    val loss  tokens/s  left   last line  checkpoint     restarts",
        "a    failed   20/100  4.8000  4.5000    1,020     3 min  2 min ago  10, 2 min ago  0",
        "b    waiting  -/100   -       -         -         -      -          -              0",
        "",
        "last exit    a: 70 (RankLostError)",
        "waiting      b: job 9: pending: Resources",
    ]
    done = write_run(Path("c"), {"6-0": DONE}, finished_at=20)
    assert status([done]).splitlines() == [
        "run  state     step   loss    val loss  tokens/s  left  last line  checkpoint    restarts",
        "c    finished  20/20  4.8000  4.5000    999       -     30 s ago   10, 50 s ago  0",
    ]
    first, second = json.loads(status([a, b], as_json=True))
    assert (first["exit_code"], first["loss"], first["left_s"]) == (70, 4.8, 180.0)
    assert (second["state"], second["job_id"], second["step"]) == ("waiting", "9", None)
    assert first.keys() == second.keys() == Status.__dataclass_fields__.keys()


def test_a_folder_that_is_no_run(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.yaml, metrics\.jsonl"):
            status([folder])


def test_spans():
    texts = ["0 s", "59 s", "1 min", "59 min", "1 h 01 min", "47 h 59 min", "2 d 00 h", "12 d 02 h"]
    assert [span(s) for s in (0.2, 59, 61, 3569, 3660, 172740, 172800, 1044000)] == texts


def test_no_torch_is_loaded():
    code = "import sys, hvdtrain.jobs.status; print(*{'torch', 'h5py', 'numpy', 'horovod'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


# --- damaged ones -------------------------------------------------------------------------------------------------

NAMES = ("config.yaml", "metrics.jsonl", "summary.json", "jobs/7-0/job.json", "jobs/submit-1.json")
KEYS = (
    "kind step loss val_loss wall_s tokens_per_s status train scaling steps tokens job_id started ended exit_code nodes"
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(("train", "finished", "eval", "7", ""))
)
TREES = st.recursive(
    LEAVES, lambda t: st.lists(t, max_size=2) | st.dictionaries(st.sampled_from(KEYS.split()), t), max_leaves=9
)
LINES = st.dictionaries(st.sampled_from(KEYS.split()), TREES).map(json.dumps) | TREES.map(json.dumps)
TEXTS = st.lists(LINES, min_size=1, max_size=3).map(lambda lines: "\n".join([*lines, ""]).encode()) | st.binary(
    max_size=20
)


@settings(max_examples=100)
@given(files=st.dictionaries(st.sampled_from(NAMES), TEXTS, min_size=1))
def test_nothing_that_is_damaged_is_an_error(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory):
    run = tmp_path_factory.mktemp("run")
    for name, raw in files.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(raw)
    for queue in ({}, RUNS, None):
        assert status_of(run, queue, NOW).state in STATES
    assert len(status([run]).splitlines()) >= 2
    json.loads(status([run], as_json=True), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


# --- real ones ----------------------------------------------------------------------------------------------------


def test_a_finished_run(trained: Path):
    found = json.loads(launch("status", trained, "--json").stdout)[0]
    log, result = read_log(trained / "metrics.jsonl"), summary(trained)
    assert (found["state"], found["step"], found["steps"], found["checkpoint_step"]) == ("finished", 12, 12, 12)
    assert found["loss"] == [line["loss"] for line in log if line["kind"] == "train"][-1]
    assert (found["val_loss"], found["tokens_per_s"]) == (result["val_loss"], result["tokens_per_s"])
    assert (found["left_s"], found["restarts"]) == (None, 0)


def test_running_then_killed_then_stopped(prepared: Prepared, tmp_path: Path):
    run = tmp_path / "run"
    words = ("train", prepared.recipe, "train.steps=1000000", "metrics.every=1", "--run-dir", run)
    args = [str(word) for word in (*HVDTRAIN, *words)]
    process = subprocess.Popen(args, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def found() -> Status:
        return Status(**json.loads(status([run], as_json=True))[0])

    try:
        until(lambda: (run / "metrics.jsonl").exists() and (found().checkpoint_step or 0) >= 6, "a checkpoint", 100)
        running = found()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed = found()
    done = launch(*words, env={"HVDTRAIN_END_TIME": "1"})
    stopped = found()
    assert done.exit_code == 75, done
    assert [one.state for one in (running, killed, stopped)] == ["running", "failed", "stopped"]
    assert killed.why == "its job is gone and has not said why"
    assert (stopped.exit_code, stopped.reason, stopped.restarts) == (75, "the job's time ends", 1)
    assert running.left_s > 0
    assert 6 <= running.step <= killed.step
    assert stopped.checkpoint_step == killed.checkpoint_step + 1 == stopped.step  # one step, then it stopped
    assert (running.steps, running.line_age_s < 60, running.checkpoint_age_s < 60) == (1000000, True, True)
