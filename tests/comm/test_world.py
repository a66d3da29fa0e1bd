"""Each launcher's marks, and what is made of them."""

import pytest

from hvdtrain.comm.world import World, check_sizes, detect_world
from hvdtrain.errors import EXIT_USAGE, LaunchError

GLOO = {
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "4",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
STEP = {
    **BATCH_SCRIPT,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
PMIX = {"PMIX_RANK": "5"}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World(0, 1, 0, 1, "none")),
        ({"HOME": "/root", "PATH": "/bin", "PMI_FD": "3"}, World(0, 1, 0, 1, "none")),
        (GLOO, World(3, 4, 1, 2, "horovodrun --gloo")),
        (OPEN_MPI, World(5, 8, 1, 4, "mpirun")),
        (HYDRA, World(2, 3, 0, 1, "mpiexec")),
        (STEP | PMIX, World(5, 7, 1, 2, "srun")),
        (BATCH_SCRIPT, World(0, 1, 0, 1, "none")),
        (BATCH_SCRIPT | OPEN_MPI, World(5, 8, 1, 4, "mpirun")),  # mpirun inside a batch script
        (STEP | PMIX | OPEN_MPI, World(5, 8, 1, 4, "mpirun")),  # mpirun inside a step: the innermost launcher counts
        (STEP | GLOO, World(3, 4, 1, 2, "horovodrun --gloo")),
        (STEP | GLOO | {"HVDTRAIN_RENDEZVOUS": "n1:99"}, World(3, 4, 1, 2, "srun --gloo")),
        (BATCH_SCRIPT | HYDRA, World(2, 3, 0, 1, "mpiexec")),
    ],
    ids=[
        "alone", "strangers", "gloo", "mpirun", "mpiexec", "srun", "batch script", "mpirun in a batch script",
        "mpirun in a step", "gloo in a step", "srun --gloo", "mpiexec in a batch script",
    ],
)  # fmt: skip
def test_marks(env: dict[str, str], world: World):
    assert detect_world(env) == world


@pytest.mark.parametrize("pmi", ["PMIX_RANK", "PMI_RANK", "PMI2_RANK", "PMI_FD", "PALS_RANKID"])
def test_any_pmi_will_do_under_srun(pmi: str):
    assert detect_world(STEP | {pmi: "5"}).size == 7


def test_srun_without_pmi_says_how_to_start():
    with pytest.raises(LaunchError, match=r"srun started 7 tasks.*srun --mpi=pmix") as caught:
        detect_world(STEP)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("marks", [{}, STEP | PMIX, OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}])
def test_a_job_of_another_size_is_refused(marks: dict[str, str]):
    """N tasks, each in a world of its own: the commonest failure of all."""
    with pytest.raises(LaunchError, match=r"the job has 8 tasks \(HVDTRAIN_RANKS\).*a world of [17] ") as caught:
        detect_world(marks | {"HVDTRAIN_RANKS": "8"})
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.rank == int(marks.get("SLURM_PROCID", 0))  # under srun one of them speaks
    assert detect_world(OPEN_MPI | {"HVDTRAIN_RANKS": "8"}).size == 8


def test_srun_of_one_task_needs_no_pmi():
    one = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}
    assert detect_world(one) == World(0, 1, 0, 1, "srun")


@pytest.mark.parametrize(("node", "local_size"), [(0, 2), (1, 2), (2, 2), (3, 1)])
def test_tasks_of_each_node(node: int, local_size: int):
    """``2(x3),1``: three nodes of two tasks, one of one."""
    assert detect_world(STEP | PMIX | {"SLURM_NODEID": str(node)}).local_size == local_size


@pytest.mark.parametrize(("text", "sizes"), [("4", [4]), ("1,2,3", [1, 2, 3]), ("8(x12),3(x2)", [8] * 12 + [3] * 2)])
def test_every_form_of_the_list(text: str, sizes: list[int]):
    step = STEP | PMIX | {"SLURM_STEP_TASKS_PER_NODE": text}
    assert [detect_world(step | {"SLURM_NODEID": str(node)}).local_size for node in range(len(sizes))] == sizes


@pytest.mark.parametrize(
    ("env", "name"),
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "five"}, "OMPI_COMM_WORLD_RANK='five'"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE=''"),
        (GLOO | {"HOROVOD_LOCAL_SIZE": "2.0"}, "HOROVOD_LOCAL_SIZE='2.0'"),
        (HYDRA | {"PMI_RANK": "x"}, "PMI_RANK='x'"),
        (STEP | PMIX | {"SLURM_PROCID": "-"}, "SLURM_PROCID='-'"),
        (STEP | PMIX | {"SLURM_STEP_TASKS_PER_NODE": "2(xthree)"}, "SLURM_STEP_TASKS_PER_NODE"),
        (STEP | PMIX | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({"PMI_SIZE": "2"}, "PMI_RANK"),
        ({"HVDTRAIN_RANKS": "two"}, "HVDTRAIN_RANKS='two'"),
    ],
)
def test_garbage_is_named(env: dict[str, str], name: str):
    with pytest.raises(LaunchError) as caught:
        detect_world(env)
    assert name in str(caught.value)


def test_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", raising=False)
    assert detect_world() == World(5, 8, 1, 4, "mpirun")


def test_only_rank_0_is_main():
    assert [World(rank=rank, size=3).is_main for rank in range(3)] == [True, False, False]


def test_sizes_that_differ_are_refused():
    world = World(0, 4, launcher="srun")
    check_sizes(world, 4, "MPI")
    with pytest.raises(LaunchError, match=r"srun started 4 tasks, but in MPI this process sees a world of 1"):
        check_sizes(world, 1, "MPI")
