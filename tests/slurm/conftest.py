"""One Slurm for the whole test session."""

from collections.abc import Iterator

import pytest
from cluster import SlurmCluster, require_slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A started cluster, shared by all tests: leave no job behind, and take nodes only from a cluster of your own."""
    require_slurm()
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
