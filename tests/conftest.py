"""What all tests share."""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from launch import Prepared, prepare, succeed

from hvdtrain.machine import malloc
from hvdtrain.machine.cores import set_library_threads

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # what is tested here shares its cores
set_library_threads(os.environ)  # as the commands do, before a test loads torch
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's `&` leaves it so, and programs under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(50_000, 20, 50)  # a million objects stay: tests, and what libraries have loaded

pytest.register_assert_rewrite("contract")  # tests that are no test module

# One profile: the same examples every time, no stopwatch.
settings.register_profile(
    "hvdtrain",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a tmp_path shared by the examples of one test
)
settings.load_profile("hvdtrain")

# mpirun runs tests/mpi, on 1, 2 and 4 ranks (`make test`); without it they would look as if they had passed on several.
# Horovod's launcher brings Gloo; tests/comm/test_group.py runs some of them under it.
_IS_MPIRUN = "OMPI_COMM_WORLD_SIZE" in os.environ or "HOROVOD_RANK" in os.environ
_WANTS_GPU = bool(os.environ.get("HVDTRAIN_GPU_TESTS"))
collect_ignore = ([] if _IS_MPIRUN else ["mpi"]) + ([] if _WANTS_GPU else ["gpu"])


def pytest_report_header() -> list[str]:
    elsewhere = [] if _IS_MPIRUN else ["tests/mpi: not in this run, but in `mpirun -np N python -m pytest tests/mpi`"]
    return elsewhere + ([] if _WANTS_GPU else ["tests/gpu: not in this run, but in `make gpu`"])


@pytest.hookimpl(optionalhook=True)  # pytest may be told to do without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from spread import ByFile  # loads pytest-xdist

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/slurm first: it is the longest, and the others fit beside it."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went: for each folder, how long its tests took."""
    reports = (r for of_kind in terminalreporter.stats.values() for r in of_kind if isinstance(r, pytest.TestReport))
    seconds = Counter[str]()
    for report in reports:
        seconds[str(Path(report.nodeid.partition("::")[0]).parent)] += report.duration
    terminalreporter.section("seconds by folder")
    for folder, took in seconds.most_common():
        terminalreporter.line(f"{took:7.1f}s {folder}")


@pytest.fixture(scope="session", autouse=True)
def _freed_memory_goes_back() -> Iterator[None]:
    """From this process, in which some tests run commands: hundreds come after them, and it would keep all of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(malloc, "ctypes", SimpleNamespace(CDLL=lambda _: None))  # another C library than GNU's
        yield


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Shards and a recipe of a second; look, do not touch."""
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def trained(prepared: Prepared) -> Path:
    """The recipe's run folder, finished by one process without a launcher; look, do not touch."""
    succeed("train", prepared.recipe, "--run-dir", prepared.folder / "trained")
    return prepared.folder / "trained"


@pytest.fixture(autouse=True)
def _torch_as_it_comes() -> Iterator[None]:
    """After every test, for the next: a command that one has called in this process turns torch's global switches."""
    yield
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if torch.backends.mkldnn.matmul.fp32_precision != "none":
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.set_num_threads(1)  # as tests/tiny.py says
