"""Who am I? Rank, size and launcher, read from the environment before anything heavy is imported.

Every launcher leaves its own marks; the first line of this table that fits decides:

    launcher             marks
    srun --gloo          the next line's, and HVDTRAIN_RENDEZVOUS             (comm/rendezvous.py)
    horovodrun --gloo    HOROVOD_RANK, HOROVOD_SIZE, HOROVOD_GLOO_RENDEZVOUS_ADDR
    jsrun                JSM_NAMESPACE_RANK, JSM_NAMESPACE_SIZE           (IBM's Spectrum MPI)
    mpirun, horovodrun   OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE       (Open MPI)
    mpirun_rsh           MV2_COMM_WORLD_RANK, MV2_COMM_WORLD_SIZE         (MVAPICH2)
    flux run             FLUX_TASK_RANK, FLUX_JOB_SIZE
    mpiexec              PMI_RANK, PMI_SIZE, other than the Slurm step's  (MPICH, Intel MPI, Cray's PALS)
    srun                 SLURM_STEP_ID with SLURM_PROCID, SLURM_NTASKS    (rank and size also through PMIx or PMI)
    none                 nothing: one process, no MPI started

All but ``none`` join their ranks over MPI or Gloo. Whether a launcher's MPI is this environment's is checked once MPI
has started (``check_sizes``). ``srun`` comes last: the others start their ranks through it, and its marks stay.

Ranks that no line fits are refused: those of torchrun, of an srun without PMI, or of a PMI that does not say how many
there are. Taken for ``none``, each would train alone and write over the others' files. HVDTRAIN_RANKS decides where
marks mislead: it says how many ranks there must be, 1 for a process that is alone. Job scripts set it, so that ranks
which do not know of one another are refused there too.

A process in an ``sbatch`` script that no ``srun`` started has SLURM_PROCID but no SLURM_STEP_ID: it is alone.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

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


def detect_world(env: Mapping[str, str] | None = None) -> World:
    """Read the launcher's marks from ``env`` (default: the process's environment).

    Errors: LaunchError where ranks were started that cannot be joined, or their number is not HVDTRAIN_RANKS.
    """
    env = os.environ if env is None else env
    world = _marked_world(env)
    wanted = _int(env, "HVDTRAIN_RANKS", 0)
    if world.size == wanted:
        return world
    if stranger := _stranger(env, world):
        raise stranger
    if wanted:
        started = "no launcher" if world.launcher == "none" else world.launcher
        raise LaunchError(
            f"the job has {wanted} tasks (HVDTRAIN_RANKS), but this process sees a world of {world.size} ({started}): "
            "the launcher belongs to another MPI than this environment's, or to none; HVDTRAIN_LAUNCHER names another",
            _int(env, "SLURM_PROCID", 0),
        )
    return world


class _Marks(NamedTuple):
    """Names of variables. local_rank, local_size: the first of them that is set."""

    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


def _marks(launcher: str, prefix: str) -> _Marks:
    return _Marks(launcher, f"{prefix}_RANK", f"{prefix}_SIZE", (f"{prefix}_LOCAL_RANK",), (f"{prefix}_LOCAL_SIZE",))


_BY_MPI = [
    _marks("jsrun", "JSM_NAMESPACE"),
    _marks("mpirun", "OMPI_COMM_WORLD"),
    _marks("mpirun_rsh", "MV2_COMM_WORLD"),
    _Marks("flux run", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", ("FLUX_TASK_LOCAL_ID",), ()),
    _Marks(
        "mpiexec",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE"),
    ),
]
_NOT_JOINED = [("torchrun", "RANK", "WORLD_SIZE"), ("a launcher of Horovod's", "HOROVOD_RANK", "HOROVOD_SIZE")]
_PMI = ("PMIX_RANK", "PMI_RANK", "PMI2_RANK", "PALS_RANKID", "PMI_FD")


def _marked_world(env: Mapping[str, str]) -> World:
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in env and "HOROVOD_RANK" in env:
        return World(
            _int(env, "HOROVOD_RANK"),
            _int(env, "HOROVOD_SIZE"),
            _int(env, "HOROVOD_LOCAL_RANK", 0),
            _int(env, "HOROVOD_LOCAL_SIZE", 1),
            "srun --gloo" if "HVDTRAIN_RENDEZVOUS" in env else "horovodrun --gloo",
        )
    step = _slurm_world(env) if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env else None
    for marks in _BY_MPI:
        if marks.size in env and not (marks.launcher == "mpiexec" and step and _is_of_step(env, marks, step)):
            return _world_of(env, marks)
    if step is None or (step.size > 1 and not any(name in env for name in _PMI)):
        return World()
    return step


def _is_of_step(env: Mapping[str, str], pmi: _Marks, step: World) -> bool:
    """Are these srun's own PMI variables, or left over from a step around this one? An mpiexec's own variables for
    local ranks would be there too.
    """
    same = (_int(env, pmi.rank), _int(env, pmi.size)) == (step.rank, step.size)
    return same or not any(name in env for name in pmi.local_rank)


def _world_of(env: Mapping[str, str], marks: _Marks) -> World:
    rank, size = _int(env, marks.rank), _int(env, marks.size)
    local_rank, local_size = (
        next((_int(env, name) for name in names if name in env), None) for names in (marks.local_rank, marks.local_size)
    )
    if local_rank is None and size > 1:
        raise LaunchError(
            f"{marks.launcher} started {size} ranks ({marks.size}) but does not say which rank of its node this one is "
            f"({' or '.join(marks.local_rank)}): start with `horovodrun -np N`, mpirun or `srun --mpi=pmix`",
            rank,
        )
    return World(rank, size, local_rank or 0, local_size or 1, marks.launcher)


def _slurm_world(env: Mapping[str, str]) -> World:
    size = _int(env, "SLURM_STEP_NUM_TASKS", _int(env, "SLURM_NTASKS", 1))
    counts, node = tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", "1")), _int(env, "SLURM_NODEID", 0)
    local_size = counts[node] if node < len(counts) else 1
    return World(_int(env, "SLURM_PROCID"), size, _int(env, "SLURM_LOCALID", 0), local_size, "srun")


def _stranger(env: Mapping[str, str], world: World) -> LaunchError | None:
    """Who has started ranks that ``world`` knows nothing of; None: nobody."""
    for launcher, rank, size in _NOT_JOINED:
        if rank in env and size in env and _int(env, size) > 1:
            theirs = _int(env, rank), _int(env, size)
            if theirs != (world.rank, world.size):
                marks = f"{rank}={theirs[0]}, {size}={theirs[1]}"
                return _refusal(f"{launcher} started {theirs[1]} ranks ({marks})", theirs[0], world)
    if world.launcher != "none":
        return None
    if "SLURM_STEP_ID" in env and (step := _slurm_world(env)).size > 1:
        return LaunchError(
            f"srun started {step.size} tasks, but each of them sees a world of 1: no PMI reached them; "
            "start with `srun --mpi=pmix` (what this Slurm offers: `srun --mpi=list`), or with mpirun inside the job",
            step.rank,
        )
    for name in _PMI:
        if name in env:
            who = f"a launcher that does not say how many ranks there are ({name}={env[name]}) started this one"
            return _refusal(who, 0 if name == "PMI_FD" else _int(env, name), world)
    return None


def _refusal(who: str, rank: int, world: World) -> LaunchError:
    others = "be alone" if world.size == 1 else f"be one of {world.size} ({world.launcher})"
    return LaunchError(
        f"{who}, and hvdtrain does not join those: start with `horovodrun -np N`, mpirun or `srun --mpi=pmix`. "
        f"If these variables are left over and this process shall {others}, set HVDTRAIN_RANKS={world.size}",
        rank,
    )


def tasks_of_nodes(text: str) -> list[int]:
    """Slurm's compressed list: ``2(x3),1`` says three nodes of two tasks, then one node of one."""
    counts: list[int] = []
    for group in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)
        if match is None:
            raise LaunchError(f"the launcher set SLURM_STEP_TASKS_PER_NODE={text!r}, which is not a list of counts")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _int(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise LaunchError(f"the launcher set {name}={text!r}, which is not a number") from None


def check_sizes(world: World, seen_size: int, library: str) -> None:
    """Refuse to go on where ``library`` joined another world than the launcher announced."""
    if seen_size != world.size:
        raise LaunchError(
            f"{world.launcher} started {world.size} tasks, but in {library} this process sees a world of {seen_size}: "
            "the launcher belongs to another MPI than the one Horovod was built with; use the mpirun of this "
            "environment (`python -m hvdtrain doctor` names it), or rebuild with your MPI's mpicxx on the PATH",
            world.rank,
        )


def node_name() -> str:
    """This machine, as the batch system calls it (``sbatch --exclude`` takes that name); elsewhere the host's name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def shares_gpus() -> bool:
    """Has the user let several ranks use one GPU? NCCL refuses that, so nothing then goes through NCCL."""
    return os.environ.get("HVDTRAIN_SHARE_GPUS") == "1"
