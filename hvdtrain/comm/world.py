"""Who am I? Rank, size and launcher, read from the environment before anything heavy is imported.

Every launcher leaves its own marks; the first line of this table that fits decides:

    launcher             marks
    srun --gloo          the next line's, and HVDTRAIN_RENDEZVOUS             (comm/rendezvous.py)
    horovodrun --gloo    HOROVOD_RANK, HOROVOD_SIZE, HOROVOD_GLOO_RENDEZVOUS_ADDR
    mpirun, horovodrun   OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE       (Open MPI)
    mpiexec              PMI_RANK, PMI_SIZE, no Slurm step                (MPICH and its family)
    srun                 SLURM_STEP_ID with SLURM_PROCID, SLURM_NTASKS    (rank and size also through PMIx or PMI2)
    none                 nothing: one process, no MPI started

A process in an ``sbatch`` script that no ``srun`` started has SLURM_PROCID but no SLURM_STEP_ID: it is alone.

A job script that knows how many ranks there must be says so in HVDTRAIN_RANKS: ranks that were started, but do not know
of one another, are then refused instead of training the same thing side by side.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hvdtrain.errors import LaunchError


@dataclass(frozen=True)
class World:
    """One process's place among all: ``rank`` of ``size``, ``local_rank`` of ``local_size`` on its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _int(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"the launcher set {name}={text!r}, which is not a number") from None


def detect_world(env: Mapping[str, str] | None = None) -> World:
    """Read the launcher's marks from ``env`` (default: the process's environment).

    Errors: LaunchError where ``srun`` started several tasks without telling them of one another (no PMI), so that each
    would train alone and write over the others; or where the size is not HVDTRAIN_RANKS.
    """
    env = os.environ if env is None else env
    world = _marked_world(env)
    wanted = _int(env, "HVDTRAIN_RANKS", world.size)
    if world.size != wanted:
        started = "no launcher" if world.launcher == "none" else world.launcher
        raise LaunchError(
            f"the job has {wanted} tasks (HVDTRAIN_RANKS), but this process sees a world of {world.size} ({started}): "
            "the launcher belongs to another MPI than this environment's, or to none; HVDTRAIN_LAUNCHER names another",
            _int(env, "SLURM_PROCID", 0),
        )
    return world


def _marked_world(env: Mapping[str, str]) -> World:
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in env and "HOROVOD_RANK" in env:
        return World(
            _int(env, "HOROVOD_RANK"),
            _int(env, "HOROVOD_SIZE"),
            _int(env, "HOROVOD_LOCAL_RANK", 0),
            _int(env, "HOROVOD_LOCAL_SIZE", 1),
            "srun --gloo" if "HVDTRAIN_RENDEZVOUS" in env else "horovodrun --gloo",
        )
    if "OMPI_COMM_WORLD_SIZE" in env:
        return World(
            _int(env, "OMPI_COMM_WORLD_RANK"),
            _int(env, "OMPI_COMM_WORLD_SIZE"),
            _int(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0),
            _int(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1),
            "mpirun",
        )
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _slurm_world(env)
    if "PMI_SIZE" in env:
        return World(
            _int(env, "PMI_RANK"),
            _int(env, "PMI_SIZE"),
            _int(env, "MPI_LOCALRANKID", 0),
            _int(env, "MPI_LOCALNRANKS", 1),
            "mpiexec",
        )
    return World()


def _slurm_world(env: Mapping[str, str]) -> World:
    rank = _int(env, "SLURM_PROCID")
    size = _int(env, "SLURM_STEP_NUM_TASKS", _int(env, "SLURM_NTASKS", 1))
    if size > 1 and not any(name in env for name in ("PMIX_RANK", "PMI_RANK", "PMI_FD", "PMI2_RANK", "PALS_RANKID")):
        raise LaunchError(
            f"srun started {size} tasks, but each of them sees a world of 1: no PMI reached them; "
            "start with `srun --mpi=pmix` (what this Slurm offers: `srun --mpi=list`), or with mpirun inside the job",
            rank,
        )
    counts, node = tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", "1")), _int(env, "SLURM_NODEID", 0)
    local_size = counts[node] if node < len(counts) else 1
    return World(rank, size, _int(env, "SLURM_LOCALID", 0), local_size, "srun")


def tasks_of_nodes(text: str) -> list[int]:
    """Slurm's compressed list: ``2(x3),1`` says three nodes of two tasks, then one node of one."""
    counts: list[int] = []
    for group in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)
        if match is None:
            raise LaunchError(f"the launcher set SLURM_STEP_TASKS_PER_NODE={text!r}, which is not a list of counts")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def check_sizes(world: World, seen_size: int, library: str) -> None:
    """Refuse to go on where ``library`` joined another world than the launcher announced."""
    if seen_size != world.size:
        raise LaunchError(
            f"{world.launcher} started {world.size} tasks, but in {library} this process sees a world of {seen_size}: "
            "the launcher belongs to another MPI than the one Horovod was built with; use the mpirun of this "
            "environment (`python -m hvdtrain doctor` names it), or rebuild with your MPI's mpicxx on the PATH"
        )
