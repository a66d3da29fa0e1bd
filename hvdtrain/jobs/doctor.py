"""What is installed and does it work? A table, and a real all-reduce between two ranks."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from hvdtrain.comm.world import detect_world
from hvdtrain.errors import LaunchError
from hvdtrain.machine.quota import quota_of_rank, read_limits

_SELF_TEST = """
from hvdtrain.comm.selftest import check_collectives
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import detect_world
with open_group(detect_world()) as group:
    assert group.size == 2, group.size
    said = check_collectives(group)
    if group.rank == 0:
        print(said)
"""


def doctor() -> tuple[str, bool]:
    """The table, and whether everything that training on several ranks needs is there and works."""
    rows: list[tuple[str, str]] = []
    healthy = True
    for name, look in _CHECKS:
        try:
            found = look()
        except Exception as error:
            found, healthy = f"MISSING: {error}", False
        rows.append((name, found))
    launchers = {
        "mpirun": ["mpirun", "-np", "2", "--oversubscribe", "--bind-to", "none"],
        "gloo": ["horovodrun", "--gloo", "-np", "2"],
    }
    for name, launcher in launchers.items():
        ok, said = _self_test(launcher)
        rows.append((f"2 ranks, {name}", said))
        healthy &= ok
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {found}" for name, found in rows), healthy


def _self_test(launcher: list[str]) -> tuple[bool, str]:
    env = _environment() | {"HVDTRAIN_RANKS": "2"}  # whatever else has left its marks here
    if shutil.which(launcher[0], path=env["PATH"]) is None:
        return False, f"FAILED: no {launcher[0]} on the PATH"
    command = [*launcher, sys.executable, "-c", _SELF_TEST]
    process = subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return False, "FAILED: no answer within 90 s; a firewall between local processes, or a broken MPI"
    told = [line for line in output.splitlines() if " ok over " in line]
    if process.returncode == 0 and told:
        return True, told[0].partition(">:")[2] or told[0]
    last = (output.strip().splitlines() or ["no output"])[-1]
    return False, f"FAILED (exit {process.returncode}): {last}"


def _environment() -> dict[str, str]:
    """What a launcher is started with: this interpreter's folder first on the PATH; as root, leave to run as root."""
    env = dict(os.environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def _torch() -> str:
    import torch

    return torch.__version__


def _cuda() -> str:
    import torch

    nvcc = "nvcc found" if shutil.which("nvcc") else "no nvcc"
    if torch.version.cuda is None:
        return f"torch is a CPU build; {nvcc}"
    gpus = [
        f"{torch.cuda.get_device_name(i)} ({'.'.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    there = f"{len(gpus)} x {', '.join(sorted(set(gpus)))}" if gpus else "no GPU"
    return f"{torch.version.cuda}; {there}; {nvcc}"


def _mpi() -> str:
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=_environment())
    if found.returncode:
        raise RuntimeError(found.stderr.strip().splitlines()[-1])
    return found.stdout.replace("\0", "").split(",")[0].strip()


def _horovod() -> str:
    import horovod
    import horovod.torch as hvd

    nccl = hvd.nccl_built()
    built = [("MPI", hvd.mpi_built()), ("Gloo", hvd.gloo_built()), ("NCCL", nccl)]
    said = ", ".join(f"{name} {'yes' if is_built else 'no'}" for name, is_built in built)
    return f"{horovod.__version__} with {said}" + (f" ({_nccl_version(nccl)})" if nccl > 1 else "")


def _nccl_version(code: int) -> str:
    """NCCL's own numbering, since 2.9: 22809 is 2.28.9."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


def _launchers() -> str:
    path = _environment()["PATH"]
    return ", ".join(name for name in ("horovodrun", "mpirun", "srun") if shutil.which(name, path=path)) or "none"


def _ranks() -> str:
    try:
        world = detect_world()
    except LaunchError as error:
        return f"REFUSED: {error}"
    return (
        "this process is alone" if world.size == 1 else f"this is rank {world.rank} of {world.size}, {world.launcher}"
    )


def _slurm() -> str:
    if shutil.which("sinfo") is None:
        return "not here"
    found = subprocess.run(["sinfo", "--version"], capture_output=True, text=True, timeout=30)
    return found.stdout.strip() or "sinfo does not answer"


def _cores() -> str:
    mine = len(os.sched_getaffinity(0))
    yielding = os.environ.get("OMPI_MCA_mpi_yield_when_idle")  # noqa: SIM112  (Open MPI's spelling)
    spin = "; OMPI_MCA_mpi_yield_when_idle=0: MPI will take cores away while it waits" if yielding == "0" else ""
    quota = quota_of_rank(limits := read_limits(), [limits])
    return f"{mine} of {os.cpu_count()} usable{f', by {quota}' if quota else ''}{spin}"


def _memory() -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{total / 2**30:.1f} GiB, {os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} free"


_CHECKS: list[tuple[str, Callable[[], str]]] = [
    ("python", lambda: f"{platform.python_version()}  {sys.executable}"),
    ("torch", _torch),
    ("CUDA", _cuda),
    ("MPI", _mpi),
    ("Horovod", _horovod),
    ("launchers", _launchers),
    ("ranks", _ranks),
    ("Slurm", _slurm),
    ("cores", _cores),
    ("memory", _memory),
]
