"""Which of several processes runs which tests (``pytest -n 3``, whatever ``--dist`` says)."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

SLURM = "tests/slurm"


class ByFile(LoadFileScheduling):
    """A process takes a whole file, as its tests share what they prepare; of tests/slurm all, as they share a Slurm.

        process 1   tests/slurm .....................................  tests/test_cli.py ....
        process 2   tests/checkpoint/test_resume.py ..  tests/comm/test_gloo.py ..
        process 3   tests/commands/test_export.py ....  tests/comm/test_timeline.py ..

    In the order in which pytest finds them, as conftest.py has it, and not those of most tests first: those are short.
    A Slurm is mostly waited for, and so are ranks that are stopped or killed: three processes keep two cores busy.
    """

    def __init__(self, config: pytest.Config, log: Producer):
        super().__init__(config, log)
        config.option.loadscopereorder = False

    def _split_scope(self, nodeid: str) -> str:
        return SLURM if nodeid.startswith(f"{SLURM}/") else super()._split_scope(nodeid)
