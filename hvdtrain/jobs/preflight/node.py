"""What one rank sees of its own node: environment, shards, disks, GPUs. All local, and none of it waits for ever."""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

import hvdtrain
from hvdtrain.data.shards import check_files, read_manifest
from hvdtrain.errors import EXIT_CRASH, EXIT_IO, EXIT_USAGE, HvdtrainError, plural
from hvdtrain.jobs.preflight.findings import Look
from hvdtrain.machine.asking import answer_of
from hvdtrain.version import versions

T = TypeVar("T")

LIMIT_S = 30.0  # for one look; a dead file system or driver answers never
LEAST_RUN_FOLDER_BYTES = 1 << 30
LEAST_SHM_BYTES = 32 << 20  # MPI and NCCL keep their buffers there, and jobs that were killed leave theirs behind
LEAST_TMP_BYTES = 32 << 20  # MPI and Python keep files there; without room for them ranks do not even start
LEAST_INODES = 1000
MOST_CELSIUS = 90  # of a GPU that has nothing to do yet
_NVIDIA_SMI_FIELDS = "uuid,temperature.gpu,ecc.errors.uncorrected.volatile.total"


def look_around(run_dir: Path | None, data: Sequence[Path], stage: Path | None) -> list[Look]:
    """All that a node's first rank sees without the others, in the table's order."""
    looks = [safely("environment", look_at_environment)]
    looks += [safely(f"shards {folder}", lambda folder=folder: look_at_shards(folder)) for folder in data]
    if run_dir is not None:
        least = LEAST_RUN_FOLDER_BYTES
        looks.append(safely("run folder's disk", lambda: look_at_disk("run folder's disk", run_dir, least, EXIT_IO)))
    if stage is not None:
        looks.append(safely("staging", lambda: look_at_staging(stage, data), EXIT_IO))
    looks.append(safely("/dev/shm", look_at_shm))
    own = Path(os.environ.get("TMPDIR") or "/tmp")
    looks.append(safely(str(own), lambda: look_at_disk(str(own), own, LEAST_TMP_BYTES)))
    return looks


def look_at_environment() -> Look:
    """The same versions, interpreter and package everywhere?"""
    seen = {**versions(), "interpreter": sys.executable, "package": str(Path(hvdtrain.__file__).parent)}
    shown = ", ".join(f"{name} {seen[name]}" for name in ("hvdtrain", "torch", "horovod", "python") if name in seen)
    return Look("environment", shown, must_agree=seen)


def look_at_shards(folder: Path) -> Look:
    """Is every shard of the manifest there, with its size? Is it the same manifest everywhere?"""
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    count = plural(len(manifest.shards), "shard")
    return Look(f"shards {folder}", f"{count}, {manifest.data_digest}", must_agree={"digest": manifest.data_digest})


def look_at_staging(target: Path, folders: Sequence[Path]) -> Look:
    """Is there room for those shards that were not copied there before?"""
    wanted = 0
    for folder in folders:
        manifest = read_manifest(folder)
        place = target / manifest.data_digest
        for info in manifest.shards:
            copy = place / info.file
            if not copy.exists() or copy.stat().st_size != info.file_bytes:
                wanted += info.file_bytes
    return look_at_disk("staging", target, wanted, EXIT_IO)


def look_at_disk(check: str, path: Path, least_bytes: int, exit_code: int = EXIT_CRASH) -> Look:
    """Free space and inodes where ``path`` is, or will be. Some file systems do not count inodes."""
    while not path.exists() and path != path.parent:
        path = path.parent
    disk = os.statvfs(path)
    free = disk.f_bavail * disk.f_frsize
    found, problem = f"{_bytes(free)} free", ""
    if free < least_bytes:
        problem = f"{_bytes(free)} free in {path}, {_bytes(least_bytes)} are needed"
    if disk.f_files > 0:
        found += f", {disk.f_favail:,} inodes"
        if disk.f_favail < LEAST_INODES:
            problem = problem or f"{disk.f_favail} inodes free in {path}, {LEAST_INODES} are needed"
    return Look(check, found, problem, amount=free, exit_code=exit_code)


def look_at_shm(path: Path = Path("/dev/shm")) -> Look:
    if not path.is_dir():
        return Look(str(path), "none", note="MPI and NCCL share memory through it")
    return look_at_disk(str(path), path, LEAST_SHM_BYTES)


def safely(check: str, look: Callable[[], Look], exit_code: int = EXIT_CRASH, limit_s: float = LIMIT_S) -> Look:
    """``look()``; if it fails, a Look with the error as its problem. exit_code: of an OSError."""
    try:
        return within(look, limit_s)
    except HvdtrainError as error:
        return Look(check, "", problem=str(error), exit_code=error.exit_code)
    except OSError as error:
        return Look(check, "", problem=error.strerror or str(error), exit_code=exit_code)
    except Exception as error:
        return Look(check, "", problem=f"{type(error).__name__}: {error}")


def within(work: Callable[[], T], limit_s: float = LIMIT_S) -> T:
    """``work()`` in a thread, which is left alone if it takes too long. Errors: TimeoutError; those of ``work``."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return results[0]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"


@dataclass(frozen=True)
class Gpu:
    """What nvidia-smi says of a GPU; None: it does not say."""

    celsius: int | None = None
    uncorrected_errors: int | None = None


@dataclass(frozen=True)
class Gpus:
    """Those that one rank sees. ``by_torch``: their names for one another; ``by_driver``: uuid -> its state.

    ``driver_problem``: nvidia-smi is there, but fails.
    """

    by_torch: tuple[str, ...] = ()
    by_driver: Mapping[str, Gpu] | None = None
    driver_problem: str = ""


def see_gpus() -> Gpus:
    by_torch = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        by_torch.append(str(getattr(torch.cuda.get_device_properties(number), "uuid", number)).removeprefix("GPU-"))
    if shutil.which("nvidia-smi") is None:
        return Gpus(tuple(by_torch))
    try:
        query = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI_FIELDS}", "--format=csv,noheader,nounits"]
        return Gpus(tuple(by_torch), parse_nvidia_smi(answer_of(query, LIMIT_S / 2)))
    except (OSError, ValueError) as error:
        return Gpus(tuple(by_torch), None, str(error))


def parse_nvidia_smi(text: str) -> dict[str, Gpu]:
    """The query's lines; ``[N/A]`` and ``[Not Supported]`` are what a GPU has no sensor for. Errors: ValueError."""
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("No devices"):
            continue
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 3:
            raise ValueError(f"nvidia-smi answers {line!r}")
        found[fields[0].removeprefix("GPU-")] = Gpu(*(int(word) if word.isdecimal() else None for word in fields[1:]))
    return found


def look_at_gpus(seen: Sequence[Gpus], ranks: int | None) -> Look:
    """A node's GPUs, seen by each of its ranks, which may see only their own.

    ranks: that will train on the node; None: not known.
    """
    here = {gpu for one in seen for gpu in one.by_torch}
    states = {uuid: gpu for one in seen for uuid, gpu in (one.by_driver or {}).items()}
    hot = [gpu.celsius for gpu in states.values() if gpu.celsius is not None]
    problems = [one.driver_problem for one in seen if one.driver_problem][:1]
    if states and not here:
        problems.append(f"nvidia-smi shows {plural(len(states), 'GPU')}, torch none")
    if hot and max(hot) >= MOST_CELSIUS:
        problems.append(f"{max(hot)} °C, before any work")
    if broken := [uuid for uuid, gpu in states.items() if gpu.uncorrected_errors]:
        problems.append(f"uncorrected memory errors (ECC) in GPU-{', GPU-'.join(broken)}")
    exit_code, note = EXIT_CRASH, ""
    if here and ranks is not None and len(here) < ranks:
        if not problems:
            exit_code = EXIT_USAGE
        problems.append(f"{plural(len(here), 'GPU')} for {plural(ranks, 'rank')}: start one rank per GPU")
    elif here and ranks is not None and len(here) > ranks:
        note = f"{plural(ranks, 'rank')}: the other GPUs will have nothing to do"
    if not here and not states and not problems:
        return Look("GPUs", "none", must_agree={"GPUs": "none"})
    found = plural(len(here), "GPU") + (f", {max(hot)} °C" if hot else "")
    return Look("GPUs", found, "; ".join(problems), note, {"GPUs": str(len(here))}, max(hot, default=0), exit_code)
