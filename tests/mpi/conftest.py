"""All ranks run all tests here, in lockstep:  mpirun -np 4 --oversubscribe --bind-to none python -m pytest tests/mpi

Rank 0 shows pytest's output. A test that fails on one rank ends the whole job at once: the others would wait for it in
their next collective. So does the time limit of the whole run.
"""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.world import detect_world

WORLD = detect_world()
LIMIT_S = 900


@pytest.hookimpl(trylast=True)  # after the terminal reporter was made
def pytest_configure(config: pytest.Config) -> None:
    if WORLD.launcher == "none":
        raise pytest.UsageError(
            "no mpirun: run `mpirun -np N --oversubscribe --bind-to none python -m pytest tests/mpi`"
        )
    if not WORLD.is_main:
        config.pluginmanager.unregister(name="terminalreporter")
    # Not a signal and not a Python thread: neither gets its turn while this rank waits inside Horovod.
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=os.dup(sys.__stderr__.fileno()))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _end_all(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _end_all(report)


def _end_all(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.failed or WORLD.size == 1:  # alone, pytest goes on to the next test as usual
        return
    sys.stdout.flush()
    if not WORLD.is_main:
        time.sleep(2)  # where all fail alike, rank 0's report is enough, and ends this wait
    told = [f"=== failed on rank {WORLD.rank} of {WORLD.size}: {report.nodeid}", report.longreprtext]
    told += [f"--- {title}\n{text}" for title, text in report.sections]
    print(*told, sep="\n", file=sys.stderr, flush=True)
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
    os._exit(1)


@pytest.fixture(scope="session")
def group(horovod: HorovodGroup) -> HorovodGroup:
    """What contracts take for the group that they are about, where they know of none of their own."""
    return horovod


@pytest.fixture(scope="session")
def horovod() -> Iterator[HorovodGroup]:
    """The group of all ranks, also of one: Horovod itself, where ``open_group`` would take a LocalGroup."""
    assert "mpi4py.MPI" not in sys.modules, "a test file's import has started MPI, without what the package sets"
    os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.2")  # ms: many small sums, each of which waits for its next look
    group = HorovodGroup(WORLD, parts=True)
    torch.set_num_threads(1)  # enough for models this small
    yield group
    group.close()
    if WORLD.launcher.endswith("--gloo"):
        return
    # Horovod's shutdown finalises MPI, unless mpi4py initialised it first: HorovodGroup sees to that order.
    from mpi4py import MPI

    assert not MPI.Is_finalized()
    assert MPI.COMM_WORLD.allreduce(1) == WORLD.size


@pytest.fixture(scope="session")
def started_mpi(horovod: HorovodGroup) -> ModuleType:
    """``mpi4py.MPI`` as the package has started it; to import it in a test file would start it without the settings."""
    from mpi4py import MPI

    return MPI


@pytest.fixture
def folder(group: HorovodGroup, tmp_path: Path) -> Path:
    """One empty folder for all ranks."""
    return group.all_gather_object(tmp_path)[0]
