"""A file system that fails for a moment costs a run nothing; one that fails for good, nothing that was saved."""

import errno
import json
import os
from pathlib import Path

import pytest
from failing_files import FailingFiles, Fault
from launch import DATA_PREP, HVDTRAIN, TRACE, Prepared, launch, snapshot, succeed, summary

EIO, STALE, DENIED = errno.EIO, errno.ESTALE, errno.EACCES


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> FailingFiles:
    return FailingFiles.build(tmp_path_factory.mktemp("failing"))


def steps_logged(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# One of each kind of file that a run looks at, reads or writes.
PASSING = [
    Fault("stat", "/run/stop", EIO),  # at the start, where it decides
    Fault("stat", "/run/stop", STALE, skip=1),  # in the loop, where it does not
    Fault("open", "recipe.yaml", STALE),
    Fault("read", "shards/manifest.json", EIO),
    Fault("open", "shards/train-00000.h5", EIO),
    Fault("mkdir", "/run", EIO),
    Fault("write", "/.config.yaml", EIO),
    Fault("rename", "/run/metrics.jsonl", DENIED),
    Fault("write", "/run/metrics.jsonl", EIO, skip=1),
    Fault("write", "/run/metrics.jsonl", STALE, skip=2),
    Fault("write", "/run/tensorboard", STALE, skip=1),
    Fault("fsync", "/.job.json", EIO),
    Fault("write", "/.job.json", STALE),
    Fault("mkdir", "/run/profile", DENIED),
    Fault("mkdir", ".step-00000006.partial", STALE),
    Fault("list", "/run/checkpoints", STALE, skip=2),
    Fault("open", ".step-00000006.partial/part", EIO),
    Fault("fsync", ".step-00000006.partial/part", EIO),
    Fault("write", "/.manifest.json", EIO),
    Fault("rename", "/checkpoints/step-00000012", STALE),
    Fault("rename", "/run/summary.json", STALE),
]


def test_each_kind_of_file_fails_once(prepared: Prepared, trained: Path, tmp_path: Path, failing: FailingFiles):
    run_dir, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_bytes(prepared.recipe.read_bytes())
    done = succeed("train", recipe, "metrics.profile=2-2", "--run-dir", run_dir, env=failing.env(*PASSING))
    failing.assert_all_failed(PASSING)
    found, expected = summary(run_dir), summary(trained)
    assert (found["sample_digest"], found["val_loss"]) == (expected["sample_digest"], expected["val_loss"])
    assert steps_logged(run_dir) == steps_logged(trained)  # no line is lost, none there twice
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"step-00000006", "step-00000012"}
    last = Path("checkpoints/step-00000012/part-00000-of-00001.safetensors")
    assert (run_dir / last).read_bytes() == (trained / last).read_bytes()
    assert not list(run_dir.rglob("*.tmp"))
    troubles = found["file_troubles"]
    assert troubles[f"cannot look for {run_dir}/stop: Stale file handle; went on without"] == 1
    assert troubles[f"{run_dir}/metrics.jsonl: Input/output error; tried again"] == 1
    told = [line for line in done.messages if line.startswith("hvdtrain: note: ")]
    assert len(told) == len(set(told)) == len(done.messages), done
    assert len(told) >= len(troubles)
    assert summary(trained)["file_troubles"] == {}


def test_a_checkpoint_that_cannot_be_written(prepared: Prepared, trained: Path, tmp_path: Path, failing: FailingFiles):
    """On one rank of two, for good: exit 74, the one before is whole, and the same command goes on from there, although
    much of what it reads fails once.
    """
    run_dir = tmp_path / "run"
    words = ("train", prepared.recipe, "--run-dir", run_dir)
    broken = Fault("fsync", ".step-00000012.partial/part-00001", EIO, times=1000)
    done = launch(*words, how="mpirun", ranks=2, env=failing.env(broken))
    assert (done.exit_code, TRACE in done.text) == (74, False), done
    assert f"OutputError: cannot save {run_dir}/checkpoints/step-00000012: Input/output error (on rank 1)" in done.text
    assert (
        failing.failed() == [f"fsync {run_dir}/checkpoints/.step-00000012.partial/part-00001-of-00002.safetensors"] * 5
    )
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000006"]
    faults = [
        Fault("list", "/run/checkpoints", DENIED),
        Fault("open", "/step-00000006/manifest.json", STALE),
        Fault("stat", "/step-00000006/part-00001", EIO),
        Fault("read", "/step-00000006/part-00000", EIO),
        Fault("open", "/run/metrics.jsonl", STALE),
        Fault("open", ".step-00000012.partial/part-00001", errno.ENOENT),  # another node's folder, not yet to be seen
    ]
    done = succeed(*words, how="mpirun", ranks=2, env=failing.env(*faults))
    failing.assert_all_failed(faults)
    assert f"hvdtrain: resumed from {run_dir}/checkpoints/step-00000006" in done.text
    found, expected = summary(run_dir), summary(trained)
    assert found["sample_digest"] == expected["sample_digest"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    assert not list((run_dir / "checkpoints").glob("damaged-*"))


def test_a_record_that_cannot_be_written_is_not_worth_the_run(
    prepared: Prepared, trained: Path, tmp_path: Path, failing: FailingFiles
):
    """For good: records, TensorBoard, heartbeats, old checkpoints that should go; and the log's disk is full. The run
    does not wait for any of them: tried for 7 seconds at each line, TensorBoard alone would hold it up for 49.
    """
    run_dir = tmp_path / "run"
    faults = [
        *(Fault("*", f"/run/{name}", EIO, times=1000) for name in ("jobs", "tensorboard", "heartbeats")),
        Fault("stat", "/run/stop", STALE, skip=1, times=1000),
        Fault("rename", "/.step-00000006.old", DENIED, times=1000),
    ]
    words = ("checkpoint.keep_last=1", "watchdog.timeout_s=100", "--run-dir", run_dir)
    program = ("sh", "-c", 'exec "$@" > /dev/full', "sh", *HVDTRAIN)
    done = succeed("train", prepared.recipe, *words, program=program, env=failing.env(*faults))
    assert summary(run_dir)["val_loss"] == summary(trained)["val_loss"]
    troubles = summary(run_dir)["file_troubles"]
    assert {text.partition(f"{tmp_path}")[0] for text in troubles} >= {
        "cannot write ",
        "cannot look for ",
        "old checkpoints stay until the next is saved: cannot delete ",
    }
    assert troubles[f"cannot write {run_dir}/tensorboard: Input/output error; went on without"] == 7  # its lines
    log = "cannot write to standard output: No space left on device; nothing more is printed there"
    assert troubles[log] == done.stderr.count(log) == 1
    assert f"no record of this job: cannot make {run_dir}/jobs/" in summary(run_dir)["fallbacks"][-1]
    assert summary(run_dir)["wall_s"] < 30


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_without_locks(tmp_path: Path, prepared: Prepared, failing: FailingFiles, number: int):
    """Lustre, where it is mounted without flock: said once, and the shards are the same."""
    words = ["text", "--input", prepared.corpus, "--tokenizer", prepared.tokenizer]
    words += ["--val-split", "tail", "--val-fraction", 0.1, "--out", tmp_path / "out"]
    faults = [Fault("flock", "/out/.lock", number, times=9)]
    faults += [Fault("write", "/out/", EIO), Fault("rename", "/out/manifest.json", STALE)]
    done = succeed(*words, program=DATA_PREP, env=failing.env(*faults))
    failing.assert_all_failed(faults)
    assert [line for line in done.messages if "lock" in line] == [
        f"hvdtrain: note: {tmp_path}/out cannot be locked there ({os.strerror(number)}): "
        "see that no other process prepares it meanwhile"
    ]
    assert snapshot(tmp_path / "out").keys() == snapshot(prepared.shards).keys()
    shards = [name for name in snapshot(prepared.shards) if name.endswith(".h5")]
    assert [snapshot(tmp_path / "out")[name] for name in shards] == [snapshot(prepared.shards)[name] for name in shards]
