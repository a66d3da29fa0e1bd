"""The record of a job in the run folder: who, where and with what, and at the end why it ended.

    RUN_DIR/jobs/4711-0/                Slurm job 4711 at its first start; 4711-1 after a requeue
    RUN_DIR/jobs/20260102-030405-815/   elsewhere: date and time (UTC), process
      job.json          written twice: at once what is known, then also what others had to be asked for
      batch_script.sh   as Slurm keeps it
      scontrol.txt      `scontrol show job`

No run ends because of its record: what cannot be found out is left out, what cannot be written is said in one line, and
what takes longer than LIMIT_S goes on in a thread beside the run.
"""

import importlib.metadata
import json
import os
import platform
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from hvdtrain.comm.group import Group
from hvdtrain.comm.world import World, node_name
from hvdtrain.errors import HvdtrainError
from hvdtrain.files import read_text, write
from hvdtrain.machine.about import machine
from hvdtrain.machine.asking import answer_of
from hvdtrain.version import git_state

LIMIT_S = 2.0
_ANSWER_S = 1.5  # for each command

_ENVIRONMENT = (
    *("SLURM_", "SRUN_", "SBATCH_", "HVDTRAIN_"),
    *("HOROVOD_", "NCCL_", "UCX_", "FI_", "OMPI_", "PMI", "CUDA_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_"),
)
# The last two: Open MPI's key of a job, and Slurm's name for a token.
_SECRET = "TOKEN|KEY|PASS|SECRET|CREDENTIAL|AUTH|COOKIE|PRECONDITION|JWT"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/\s]*@")  # https://user:password@host
_SECRET_SET = re.compile(rf"""\b([A-Z0-9_]*(?:{_SECRET})[A-Z0-9_]*=)("[^"]*"|'[^']*'|[^\s;]+)""")

_one_at_a_time = threading.Lock()  # a job may end while its beginning is still being written


def record_job(
    run_dir: Path,
    recipe_words: Sequence[str],
    group: Group,
    world: World,
    config: BaseModel,
    corpora_identity: Mapping[str, Any],
    step: int = 0,
    steps: int = 0,
) -> tuple[Path, list[str]]:
    """Begin the job's record in ``run_dir``, which exists (collective; rank 0 writes).

    recipe_words: RECIPE and its key=value. step: from which the job goes on, to ``steps``.
    Returns the record's folder, and what has to be said about it; both are the same on all ranks.
    """
    seats = group.all_gather_object((node_name(), socket.gethostname()))
    folder, notes = run_dir / "jobs" / job_name(os.environ), []
    if group.rank == 0:
        known = {
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "restart": int(_restart(os.environ)),
            "started": _now(),
            "step_began": step,
            "steps": steps,
            "world_size": group.size,
            "launcher": world.launcher,
            "backend": group.backend,
            "nodes": {node: [rank for rank, seat in enumerate(seats) if seat[0] == node] for node, _ in seats},
            "hosts": sorted({host for _, host in seats}),
            "command": list(sys.orig_argv),
            "recipe": [str(word) for word in recipe_words],
            "cwd": os.getcwd(),
        }
        try:
            folder = _new_folder(folder)
        except OSError as error:
            notes = [f"no record of this job: cannot make {folder}: {error.strerror}"]
        else:
            notes = _bounded(lambda: _write_record(folder, known, config, corpora_identity), folder)
    name, notes = group.all_gather_object((str(folder), notes))[0]
    return Path(name), notes


def close_job(folder: Path, exit_code: int, reason: str, step: int) -> list[str]:
    """Write into the record when and why the job ended, and its last step (local; rank 0 calls it).

    Returns what has to be said about it. Where no record was begun, nothing happens.
    """
    ended = {"ended": _now(), "exit_code": exit_code, "reason": reason, "step_ended": step}

    def add() -> None:
        if not folder.is_dir():
            return
        fields = {}
        with suppress(OSError, ValueError):
            fields = json.loads(read_text(folder / "job.json"))
        _write_json(folder / "job.json", {**fields, **ended} if isinstance(fields, dict) else ended)

    return _bounded(add, folder)


def job_name(env: Mapping[str, str]) -> str:
    """The name of the record's folder: of the Slurm job and how often it was started anew, or of time and process."""
    if job_id := env.get("SLURM_JOB_ID"):
        return f"{job_id}-{_restart(env)}"
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}"


def _restart(env: Mapping[str, str]) -> str:
    count = env.get("SLURM_RESTART_COUNT", "")
    return count if count.isdecimal() else "0"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _new_folder(wanted: Path) -> Path:
    """``wanted``, or with a number where one job trains in the same run folder again."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in range(2, 10000):
        try:
            wanted.mkdir()
            return wanted
        except FileExistsError:
            wanted = wanted.with_name(f"{wanted.name.partition('.')[0]}.{number}")
    raise FileExistsError(0, "too many records", str(wanted))


def _bounded(work: Callable[[], None], folder: Path) -> list[str]:
    """Do ``work`` in a thread, and wait for it up to LIMIT_S. Returns what has to be said about it."""
    problems = []

    def run() -> None:
        try:
            with _one_at_a_time:
                work()
        except HvdtrainError as error:
            problems.append(f"the record of this job is not whole: {error}")
        except Exception as error:  # whatever it is, it is not worth the run
            problems.append(f"the record of this job in {folder} is not whole: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name="job record", daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    return [f"the record of this job in {folder} takes long; it may not be whole"] if thread.is_alive() else problems


def _write_record(folder: Path, known: dict[str, Any], config: BaseModel, data: Mapping[str, Any]) -> None:
    fields = {**known, "config": config.model_dump(mode="json"), "data": dict(data), "env": telling(os.environ)}
    if modules := os.environ.get("LOADEDMODULES"):
        fields["modules"] = modules.split(":")
    _write_json(folder / "job.json", fields)
    fields |= {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": platform.platform(),
        "machine": machine(),
        "packages": _packages(),
    }
    if state := git_state(Path(__file__).parent):
        fields["git"] = {"commit": state.removesuffix("-dirty"), "dirty": state.endswith("-dirty")}
    _write_json(folder / "job.json", fields)
    if known["job_id"]:
        for name, text in (("batch_script.sh", _batch_script), ("scontrol.txt", _show_job)):
            with suppress(OSError, UnicodeDecodeError):
                if found := text(known["job_id"]):
                    (folder / name).write_text(without_secrets(found), encoding="utf-8")


def telling(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how a job runs, in order of their names; without anything that looks like a secret."""
    return {
        name: value
        for name, value in sorted(env.items())
        if name.startswith(_ENVIRONMENT) and not _SECRET_NAME.search(name) and not _SECRET_VALUE.search(value)
    }


def without_secrets(script: str) -> str:
    """A shell script in which no variable is set to what looks like a secret."""
    return _SECRET_VALUE.sub("://***@", _SECRET_SET.sub(r"\1***", script))


def _packages() -> dict[str, str]:
    """All that is installed. A broken one may have no name."""
    found = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata}
    return {name: found[name] for name in sorted(filter(None, found), key=str.lower)}


def _batch_script(job_id: str) -> str:
    try:
        return answer_of(["scontrol", "write", "batch_script", job_id, "-"], _ANSWER_S)
    except OSError:
        return Path(os.environ.get("HVDTRAIN_BATCH_SCRIPT", "")).read_text(encoding="utf-8")


def _show_job(job_id: str) -> str:
    return answer_of(["scontrol", "show", "job", job_id], _ANSWER_S)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    # A variable's or a word's bytes need not be UTF-8; JSON can tell them all the same.
    text = json.dumps(fields, indent=1, ensure_ascii=False, default=str) + "\n"
    write(path, lambda temporary: temporary.write_bytes(text.encode("utf-8", "backslashreplace")))
