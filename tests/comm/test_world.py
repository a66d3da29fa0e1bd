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
PALS = {"PALS_RANKID": "5", "PMI_RANK": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}
FLUX = {
    "FLUX_JOB_SIZE": "8", "FLUX_TASK_RANK": "5", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2",
    "PMI_FD": "9", "PMI_RANK": "5", "PMI_SIZE": "8",
}  # fmt: skip
MVAPICH2 = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
JSRUN = {name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE"): value for name, value in OPEN_MPI.items()}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
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
        ({"HOME": "/root", "PATH": "/bin", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, World(0, 1, 0, 1, "none")),
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
        (STEP | HYDRA, World(2, 3, 0, 1, "mpiexec")),
        (STEP | PMIX | HYDRA, World(2, 3, 0, 1, "mpiexec")),
        (STEP | {"PMI_RANK": "5", "PMI_SIZE": "7"}, World(5, 7, 1, 2, "srun")),
        (STEP | PMIX | {"PMI_RANK": "0", "PMI_SIZE": "1"}, World(5, 7, 1, 2, "srun")),
        (PALS, World(5, 8, 1, 4, "mpiexec")),
        (MVAPICH2, World(5, 8, 1, 4, "mpirun_rsh")),
        (STEP | FLUX, World(5, 8, 1, 1, "flux run")),
        (JSRUN | OPEN_MPI, World(5, 8, 1, 4, "jsrun")),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, World(0, 1, 0, 1, "mpiexec")),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, World(0, 1, 0, 1, "none")),
        (OPEN_MPI | TORCHRUN | {"RANK": "5", "WORLD_SIZE": "8"}, World(5, 8, 1, 4, "mpirun")),
    ],
    ids=[
        "alone", "strangers", "gloo", "mpirun", "mpiexec", "srun", "batch script", "mpirun in a batch script",
        "mpirun in a step", "gloo in a step", "srun --gloo", "mpiexec in a batch script",
        "mpiexec by srun", "mpiexec by srun with PMIx", "srun with PMI", "srun in a step of one with PMI", "PALS",
        "MVAPICH2", "Flux started by srun", "jsrun", "mpiexec of one", "torchrun of one", "a script that tells torch",
    ],
)  # fmt: skip
def test_marks(env: dict[str, str], world: World):
    assert detect_world(env) == world


@pytest.mark.parametrize(
    ("env", "who", "rank", "really"),
    [
        (TORCHRUN, "torchrun started 4 ranks (RANK=3, WORLD_SIZE=4)", 3, 1),
        (BATCH_SCRIPT | TORCHRUN, "torchrun started 4 ranks", 3, 1),
        (STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"} | TORCHRUN, "torchrun started 4 ranks", 3, 1),
        (STEP | PMIX | TORCHRUN, "torchrun started 4 ranks", 3, 7),
        (OPEN_MPI | TORCHRUN | {"RANK": "3", "WORLD_SIZE": "8"}, "torchrun started 8 ranks (RANK=3", 3, 8),
        ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}, "a launcher of Horovod's started 2 ranks", 1, 1),
        (PMIX, "a launcher that does not say how many ranks there are (PMIX_RANK=5)", 5, 1),
        ({"PMI_RANK": "1"}, "(PMI_RANK=1)", 1, 1),
        ({"PMI_FD": "3"}, "(PMI_FD=3)", 0, 1),
        ({"PALS_RANKID": "2", "PALS_LOCAL_RANKID": "0"}, "(PALS_RANKID=2)", 2, 1),
        (STEP, "srun started 7 tasks", 5, 1),
    ],
    ids=[
        "torchrun", "torchrun in a batch script", "torchrun in a step of one task", "torchrun in a step",
        "torchrun in mpirun", "Horovod", "PMIx", "PMI", "PMI's pipe", "PALS without PMI", "srun without PMI",
    ],
)  # fmt: skip
def test_ranks_that_cannot_be_joined_are_refused(env: dict[str, str], who: str, rank: int, really: int):
    """Not taken for one process that is alone. Where the marks are left over, HVDTRAIN_RANKS says what is right."""
    with pytest.raises(LaunchError) as caught:
        detect_world(env)
    assert who in str(caught.value)
    assert (caught.value.rank, caught.value.exit_code) == (rank, EXIT_USAGE)  # rank 0 of them alone will speak
    if "srun started" not in who:
        assert f"set HVDTRAIN_RANKS={really}" in str(caught.value)
    assert detect_world(env | {"HVDTRAIN_RANKS": str(really)}).size == really


@pytest.mark.parametrize("env", [HYDRA, PALS, MVAPICH2, FLUX, JSRUN])
def test_a_launcher_that_does_not_say_where_a_rank_is_on_its_node(env: dict[str, str]):
    """Rank 0 of its node would be a guess: all of them would take the first GPU."""
    with pytest.raises(LaunchError, match="does not say which rank of its node this one is"):
        detect_world({name: value for name, value in env.items() if "LOCAL" not in name})


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
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
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
