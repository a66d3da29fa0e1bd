"""Preflight on real ranks, each of which stands for a node: all is well; then the last one is sick. And a record."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import BaseModel
from tiny import random_tokens, write_data

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.world import detect_world
from hvdtrain.jobs.job_record import record_job
from hvdtrain.jobs.preflight import Inspection, clock, examine, node, shared_folder, speed
from hvdtrain.jobs.preflight.findings import Verdict

NOISE = 50.0  # the ranks share few cores with other work


@pytest.fixture
def look(group: HorovodGroup, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Verdict]:
    """Look at all nodes; every rank is in a folder of its own, where only a link leads to the run and the shards."""
    if group.rank == 0:
        write_data(folder / "shards", train=[random_tokens(40)])
        (folder / "run").mkdir()
    here = folder / f"n{group.rank}"
    here.mkdir()
    (here / "shards").symlink_to("../shards")
    (here / "run").symlink_to("../run")
    monkeypatch.chdir(here)
    monkeypatch.setenv("SLURMD_NODENAME", here.name)
    monkeypatch.setattr(shared_folder, "_PATIENCE_S", 0.5)
    for name, less in (("_SECONDS", 0.02), ("_COPY_BYTES", 1 << 20), ("_REDUCE_BYTES", 1 << 18)):
        monkeypatch.setattr(speed, name, less)
    group.barrier()
    return lambda: examine(Inspection(run_dir=Path("run"), data=(Path("shards"),), slow_factor=NOISE), group)


def test_all_is_well(group: HorovodGroup, folder: Path, look: Callable[[], Verdict]):
    verdict = look()
    assert (verdict.exit_code, verdict.bad_nodes, verdict.message) == (0, (), ""), verdict
    assert len({str(other) for other in group.all_gather_object(verdict)}) == 1  # all ranks know it
    found: dict[str, set[str]] = {}
    for finding in verdict.findings:
        found.setdefault(finding.check, set()).add(finding.node)
    checks = {"environment", "shards shards", "run folder", "run folder's disk", "/dev/shm", "GPUs"}
    checks |= {"matrix product", "memory copy"} | ({"clock", "all-reduce", "tensor axis"} if group.size > 1 else set())
    assert found.keys() >= checks
    assert all(nodes == {f"n{rank}" for rank in range(group.size)} for nodes in found.values())
    group.barrier()
    assert list((folder / "run").iterdir()) == []


def test_the_record_names_all_nodes(group: HorovodGroup, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Not each rank its own, although each would give it another name."""
    monkeypatch.setenv("SLURMD_NODENAME", f"n{group.rank // 2}")
    monkeypatch.setenv("SLURM_JOB_ID", str(group.rank))
    record, notes = record_job(folder, ["demo"], group, detect_world(), _Config(), {}, step=3)
    assert (record, notes) == (folder / "jobs" / "0-0", [])
    job = json.loads((record / "job.json").read_text(encoding="utf-8"))
    ranks = [rank for ranks in job["nodes"].values() for rank in ranks]
    assert (ranks, list(job["nodes"])[-1]) == (list(range(group.size)), f"n{(group.size - 1) // 2}")
    assert (job["world_size"], job["launcher"], job["backend"]) == (group.size, "mpirun", "mpi")


class _Config(BaseModel):
    pass


def _no_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("shards").unlink()


def _own_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("run").unlink()


def _other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {**node.versions(), "torch": "0.4.1"}
    monkeypatch.setattr(node, "versions", lambda: versions)


def _wrong_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "time", SimpleNamespace(time=lambda: time.time() + 1000))


def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_matrix_product", lambda *_: 1e-4)


def _broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(speed, "_matrix_product", fail)


@pytest.mark.parametrize(
    ("sickness", "check", "problem", "alone"),
    [
        (_no_shards, "shards shards", "no shards in shards", 65),
        (_own_run_folder, "run folder", "run is not the folder that n0", 0),
        (_other_version, "environment", "torch 0.4.1, elsewhere", 0),
        (_wrong_clock, "clock", "more than 1 s from the others", 0),
        (_slow, "matrix product", "is slower than the ranks' median by more than 50 times", 0),
        (_broken, "computing", "RuntimeError: CUDA error: uncorrectable ECC error encountered", 70),
    ],
)
def test_the_sick_one_is_named(
    group: HorovodGroup,
    look: Callable[[], Verdict],
    monkeypatch: pytest.MonkeyPatch,
    sickness: Callable[[pytest.MonkeyPatch], None],
    check: str,
    problem: str,
    alone: int,
):
    """alone: the exit code where there is no other node to compare with, or to blame."""
    last = group.size - 1
    if group.rank == last:
        sickness(monkeypatch)
    verdict = look()
    assert verdict.exit_code == (70 if last else alone), verdict
    if last:
        assert verdict.bad_nodes == (f"n{last}",)
        bad = [finding for finding in verdict.findings if finding.is_bad]
        assert [(finding.node, finding.check) for finding in bad] == [(f"n{last}", check)]
        assert problem in bad[0].verdict
