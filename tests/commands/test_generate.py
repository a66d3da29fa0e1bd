"""What ``generate`` refuses. How it draws is in tests/tasks/test_decoding.py, of whole runs in tests/test_train.py."""

from pathlib import Path

import pytest

from hvdtrain.comm.world import World
from hvdtrain.commands.generate import generate
from hvdtrain.errors import ConfigError
from hvdtrain.tasks.decoding import SamplingOptions


def test_one_process_only(tmp_path: Path):
    with pytest.raises(ConfigError, match="generate works on one process; mpirun started 2"):
        generate(tmp_path, "x", SamplingOptions(), World(0, 2, 0, 2, "mpirun"))
