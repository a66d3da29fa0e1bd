"""Where runs stand, from the files in their folders and, where there is Slurm, from its queue.

    waiting     a job of it waits in the queue
    running     a job of it runs; without a queue: its process is there, or has given a sign of life not long ago
    stopped     it ended early in good order (exit 75, or Ctrl-C): the same command goes on
    finished    it has a summary.json
    failed      its last job ended with another exit code, or without a word

It reads small files and the end of metrics.jsonl, without torch. A file that is missing or damaged is no error: what it
would say is not known.
"""

import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from hvdtrain.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_STOPPED_EARLY, CheckpointError, HvdtrainError
from hvdtrain.files import exists, listed, optional, read_text, seen
from hvdtrain.jobs.slurm import Queued, ask_queue, id_of, job_ids, read_object

_TAIL_BYTES = 1 << 20  # of metrics.jsonl: some two thousand lines
_WAITS = re.compile("PENDING|REQUEUE|SPECIAL_EXIT|RESV_DEL_HOLD")
# Without a queue a run is taken for dead after this silence, or ten times what lies between two of its lines.
_SILENCE_S = 600
_CHECKPOINT = re.compile(r"step-(\d{8,})", re.ASCII)


@dataclass(frozen=True)
class Status:
    """Where a run stands; None: not known. Ages and times in seconds, losses in nats per target token.

    why: what lies behind the state, such as Slurm's reason to wait. exit_code, reason: how its last job ended.
    left_s: what the steps to come will take at the recent speed. line_age_s: since the last line of metrics.jsonl.
    """

    run_dir: str
    state: str
    why: str
    job_id: str | None
    step: int | None
    steps: int | None
    loss: float | None
    val_loss: float | None
    tokens_per_s: float | None
    left_s: float | None
    line_age_s: float | None
    restarts: int
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    exit_code: int | None
    reason: str


def status(run_dirs: Sequence[Path], as_json: bool = False) -> str:
    """What ``hvdtrain status`` prints: a table, or a JSON list with the fields of ``Status``.

    Errors: CheckpointError for a folder that holds nothing of a run.
    """
    for run_dir in run_dirs:
        if not any(exists(run_dir / name) for name in ("config.yaml", "metrics.jsonl", "summary.json", "jobs")):
            raise CheckpointError(
                f"{run_dir} is not a run folder: it has no config.yaml, metrics.jsonl, summary.json or jobs"
            )
    queue = ask_queue(sorted({job_id for run_dir in run_dirs for job_id in job_ids(run_dir)}, key=int))
    found = [status_of(run_dir, queue, time.time()) for run_dir in run_dirs]
    return json.dumps([asdict(one) for one in found], indent=1, ensure_ascii=False) if as_json else as_text(found)


def status_of(run_dir: Path, queue: Mapping[str, Queued] | None, now: float) -> Status:
    """queue: the jobs that wait or run; None: nobody can tell. now: seconds since 1970."""
    summary = read_object(run_dir / "summary.json")
    log = read_tail(run_dir / "metrics.jsonl")
    train = [line for line in log if line.get("kind") == "train"]
    jobs = _read_jobs(run_dir / "jobs")
    last_job = jobs[-1] if jobs else _JobRecord()
    saved_step, saved_at = _newest_checkpoint(run_dir)

    steps_seen = [int(seen) for seen in (_last(train, "step"), saved_step) if seen is not None]
    step = max(steps_seen, default=None)  # a checkpoint of a step without a line: where it was asked to stop
    ended_at = _number(summary, "step")
    is_finished = summary.get("status") == "finished" and (ended_at is None or (step or 0) <= ended_at)
    if is_finished and ended_at is not None:
        step = int(ended_at)
    step_s = _seconds_per_step(train)
    line_age = _age(run_dir / "metrics.jsonl", now)
    signs = [_age(run_dir / "heartbeats" / "rank-00000.json", now), line_age, last_job.age(now)]
    silence_s = min((sign for sign in signs if sign is not None), default=math.inf)
    quiet_s = max(_SILENCE_S, 10 * step_s * _steps_per_line(train)) if step_s else _SILENCE_S

    state, why = _judge(job_ids(run_dir), queue, last_job, is_finished, silence_s, quiet_s)
    if seen(run_dir / "stop"):
        why = f"{why}; " * bool(why) + f"remove {run_dir}/stop to let it go on"
    steps = step if state == "finished" else _steps(run_dir, last_job)
    left_s = None
    if state != "finished" and step_s is not None and steps is not None and step is not None:
        if state == "running":
            left_s = max(0.0, (steps - step) * step_s - (line_age or 0.0))
        else:  # it goes on from its checkpoint
            left_s = max(0, steps - (saved_step or 0)) * step_s
    rate = _number(summary, "tokens_per_s") if state == "finished" else None
    return Status(
        run_dir=str(run_dir),
        state=state,
        why=why,
        job_id=_job_id(job_ids(run_dir), queue, last_job),
        step=step,
        steps=steps,
        loss=_last(train, "loss"),
        val_loss=_last([line for line in log if line.get("kind") == "eval"], "val_loss"),
        tokens_per_s=rate or _last(train, "tokens_per_s"),
        left_s=left_s,
        line_age_s=line_age,
        restarts=max(0, len(jobs) - 1),
        checkpoint_step=saved_step,
        checkpoint_age_s=None if saved_at is None else max(0.0, now - saved_at),
        exit_code=last_job.exit_code,
        reason=last_job.reason,
    )


def _judge(
    ids: Sequence[str],
    queue: Mapping[str, Queued] | None,
    last: "_JobRecord",
    is_finished: bool,
    silence_s: float,
    quiet_s: float,
) -> tuple[str, str]:
    """The state and what lies behind it."""
    queued = {job_id: queue[job_id] for job_id in ids if job_id in queue} if queue else {}
    waits = [job for job in queued.values() if _WAITS.match(job.state)]
    runs = [job for job in queued.values() if not _WAITS.match(job.state)]
    if is_finished and not waits and (last.has_ended or not runs):
        return "finished", ""
    if runs:
        why = [runs[0].state.lower()] if runs[0].state != "RUNNING" else []
        if quiet_s < silence_s < math.inf and not last.has_ended:  # it hangs, or is gone from an allocation that stays
            why.append(f"silent for {span(silence_s)}")
        return "running", ", ".join(why)
    if waits:
        return "waiting", f"{waits[0].state.lower()}: {waits[0].reason}"
    if last.has_ended:
        in_order = last.exit_code in (EXIT_OK, EXIT_STOPPED_EARLY, EXIT_INTERRUPTED)
        return ("stopped" if in_order else "failed"), ""
    if last.is_there:
        is_gone = queue is not None if last.job_id else last.is_alive is False
        if not is_gone and (last.is_alive or silence_s <= quiet_s):
            return "running", ""
        return "failed", "its job is gone and has not said why" if is_gone else f"silent for {span(silence_s)}"
    if silence_s <= quiet_s and not (ids and queue is not None):
        return "running", ""
    if ids and queue is not None:
        return "stopped", f"job {ids[-1]} is not in the queue and has left no record"
    if ids and silence_s == math.inf:
        return "waiting", f"job {ids[-1]} was submitted; there is no squeue here to ask"
    return "stopped", "" if silence_s == math.inf else f"silent for {span(silence_s)}"


def _job_id(ids: Sequence[str], queue: Mapping[str, Queued] | None, last: "_JobRecord") -> str | None:
    """Of the job in the queue, else of the last one."""
    return next((job_id for job_id in reversed(ids) if queue and job_id in queue), last.job_id or (ids or [None])[-1])


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _JobRecord:
    """What a start of the run has left in jobs/NAME/job.json (see job_record.py); times in seconds since 1970.

    is_alive: is its rank 0 still there? None: it ran on another machine, or under Slurm, which knows.
    """

    is_there: bool = False
    job_id: str | None = None
    began_at: float = 0.0
    has_ended: bool = False
    exit_code: int | None = None
    reason: str = ""
    ranks: int | None = None
    steps: int | None = None
    is_alive: bool | None = None

    def age(self, now: float) -> float | None:
        return max(0.0, now - self.began_at) if self.is_there else None


def _read_jobs(folder: Path) -> list[_JobRecord]:
    """In the order in which they began."""
    found = []
    for path in _listed(folder):
        path /= "job.json"
        if not seen(path):
            continue
        fields = read_object(path)
        code, ranks, steps = (_number(fields, key) for key in ("exit_code", "world_size", "steps"))
        job_id, reason = fields.get("job_id") or id_of(path.parent.name), fields.get("reason")
        record = _JobRecord(
            is_there=True,
            job_id=str(job_id) if isinstance(job_id, str | int) else None,
            began_at=_moment(fields.get("started")) or _changed_at(path) or 0.0,
            has_ended=code is not None or isinstance(fields.get("ended"), str),
            exit_code=None if code is None else int(code),
            reason=reason if isinstance(reason, str) else "",
            ranks=None if ranks is None else int(ranks),
            steps=None if steps is None else int(steps),
            is_alive=_is_alive(path.parent.name, fields.get("nodes")),
        )
        found.append(record)
    return sorted(found, key=lambda record: record.began_at)


def _is_alive(name: str, nodes: Any) -> bool | None:
    """Is the process that a record without Slurm is named after still there? None: another machine knows."""
    process = re.fullmatch(r"\d{8}-\d{6}-(\d+)(\.\d+)?", name, re.ASCII)
    first = next(iter(nodes), None) if isinstance(nodes, dict) else None  # that of rank 0
    if process is None or first != socket.gethostname().partition(".")[0]:
        return None
    with suppress(OSError):
        return b"hvdtrain" in Path(f"/proc/{process[1]}/cmdline").read_bytes()  # else the number is another's by now
    return False


def read_tail(path: Path, size: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """The lines in the last ``size`` bytes of a metrics.jsonl; half a line, at either end, is no JSON and dropped."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            raw = file.read(size)
    except OSError:
        return []
    lines = []
    for text in raw.splitlines():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and _number(line, "step") is not None:
                lines.append(line)
    return lines


def _listed(folder: Path, pattern: str = "*") -> list[Path]:
    return optional(lambda: listed(folder, pattern), f"cannot read {folder}", [])


def _newest_checkpoint(run_dir: Path) -> tuple[int | None, float | None]:
    """Its step and when it was whole. The manifest is written last; digests are not looked at."""
    found = [
        (int(name[1]), at)
        for path in _listed(run_dir / "checkpoints", "step-*")
        if (name := _CHECKPOINT.fullmatch(path.name)) and (at := _changed_at(path / "manifest.json")) is not None
    ]
    return max(found, default=(None, None))


def _steps(run_dir: Path, job: _JobRecord) -> int | None:
    """Of the whole run, as the job or the configuration has them."""
    if job.steps is not None:
        return job.steps
    try:
        tree = yaml.safe_load(read_text(run_dir / "config.yaml"))
        train, scaling = tree["train"], tree.get("scaling", {})
        is_open = train.get("tokens") or train.get("epochs")
        is_scaled = scaling.get("base_batch") or scaling.get("base_tokens") or scaling.get("per_rank")
        if not (is_open or is_scaled):
            return int(train["steps"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return None
    return _scaled_steps(tree, job.ranks) if job.ranks else None


def _scaled_steps(tree: dict[str, Any], ranks: int) -> int | None:
    """Of a run that was given in tokens or for another batch; None where the length is in epochs of unknown data."""
    from hvdtrain.config import make_config  # and torch with it
    from hvdtrain.sizing import scaled

    with suppress(HvdtrainError):
        return scaled(make_config(tree, "config.yaml"), ranks, 0).steps
    return None


def _seconds_per_step(train: Sequence[Mapping[str, Any]]) -> float | None:
    """Wall time, evaluation and saving included, over the lines of the process that wrote last.

    Its first line, which holds the start-up, is left out where there are others.
    """
    points: list[tuple[float, float]] = []
    for line in train:
        step, wall_s = _number(line, "step"), _number(line, "wall_s")
        if step is None or wall_s is None:
            continue
        if points and (wall_s < points[-1][1] or step <= points[-1][0]):
            points = []  # another process: its clock began anew
        points.append((step, wall_s))
    (first, began), (last, ended) = (points[0], points[-1]) if points else ((0, 0.0), (0, 0.0))
    return (ended - began) / (last - first) if last > first else None


def _steps_per_line(train: Sequence[Mapping[str, Any]]) -> float:
    return max(1.0, train[-1]["step"] - train[-2]["step"]) if len(train) > 1 else 1.0


def _number(fields: Mapping[str, Any], key: str) -> float | None:
    value = fields.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e18 else None  # which neither infinity nor NaN is


def _last(lines: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((value for line in reversed(lines) if (value := _number(line, key)) is not None), None)


def _moment(text: Any) -> float | None:
    """Seconds since 1970 of an ISO date, taken as local time where it has no zone."""
    with suppress(TypeError, ValueError, OverflowError, OSError):
        return datetime.fromisoformat(text).timestamp()
    return None


def _changed_at(path: Path) -> float | None:
    with suppress(OSError):
        return path.stat().st_mtime
    return None


def _age(path: Path, now: float) -> float | None:
    changed_at = _changed_at(path)
    return None if changed_at is None else max(0.0, now - changed_at)


# --- printing -----------------------------------------------------------------------------------------------------


def as_text(found: Sequence[Status]) -> str:
    """A row for each run, and below the table what does not fit into it."""
    rows = [["run", "state", "step", "loss", "val loss", "tokens/s", "left", "last line", "checkpoint", "restarts"]]
    for run in found:
        rows.append(
            [
                run.run_dir,
                run.state,
                f"{_show(run.step, ',')}/{_show(run.steps, ',')}",
                _show(run.loss, ".4f"),
                _show(run.val_loss, ".4f"),
                _show(run.tokens_per_s, ",.0f"),
                _ago(run.left_s, ""),
                _ago(run.line_age_s),
                "-" if run.checkpoint_step is None else f"{run.checkpoint_step:,}, {_ago(run.checkpoint_age_s)}",
                str(run.restarts),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = [note for run in found for note in _notes(run)]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _notes(run: Status) -> list[str]:
    notes = []
    if run.why:
        job = f"job {run.job_id}: " if run.job_id and run.state in ("waiting", "running") else ""
        notes.append(f"{run.state:<12} {run.run_dir}: {job}{run.why}")
    if run.exit_code:
        notes.append(f"{'last exit':<12} {run.run_dir}: {run.exit_code}{f' ({run.reason})' if run.reason else ''}")
    return notes


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ago(seconds: float | None, ago: str = " ago") -> str:
    return "-" if seconds is None else f"{span(seconds)}{ago}"


def span(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 04 h``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"
