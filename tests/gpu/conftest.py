"""The tests of `make gpu`: what a GPU computes against the CPU in fp32. Another pytest leaves this folder out.

HVDTRAIN_GPU_TESTS=cpu runs their own code on a machine without a GPU: what only CUDA has is then skipped.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

WHERE = os.environ.get("HVDTRAIN_GPU_TESTS", "")
DEVICE = torch.device("cuda" if WHERE == "cuda" else "cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a GPU, even to try the test's own code")
    config.addinivalue_line("markers", "alone: takes all of the GPU's memory")
    if WHERE == "cuda" and not torch.cuda.is_available():
        pytest.exit("tests/gpu: torch finds no GPU; see `python -m hvdtrain doctor`", returncode=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WHERE != "cuda":
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="HVDTRAIN_GPU_TESTS is not cuda"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Test by test: there are two files, and more workers."""
    from xdist.scheduler import LoadScheduling

    return LoadScheduling(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A line of JSON for each test, as soon as it has ended: what ran before the time was up counts."""
    path = os.environ.get("HVDTRAIN_GPU_RESULTS")
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # whose reports the main process has too
    if path and not is_worker and (report.when == "call" or report.outcome != "passed"):
        told = dict(report.user_properties)
        line = {"test": report.nodeid.rpartition("/")[2], "outcome": report.outcome, "s": round(report.duration, 2)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **told}) + "\n")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def plain_fp32() -> Iterator[None]:
    """TF32 off, whatever the test before has left."""
    from hvdtrain.machine.matmul import use_tf32

    use_tf32(False)
    yield
    use_tf32(False)
