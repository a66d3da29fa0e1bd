"""What came of each mode: read from what its run recorded, beside the baseline, as a table."""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdtrain.errors import EXIT_DIVERGED, EXIT_OK
from hvdtrain.files import read_text
from hvdtrain.watch.log_file import STEP_PARTS, read_log

# How far replicas are from one another, or their gradients from the weights; the first that a run tells of.
_APART = {"consensus_distance": "consensus distance", "staleness_mean": "staleness"}
_MIB = 1 << 20


@dataclass(frozen=True)
class Result:
    """Of one mode. Lists go together: of each evaluation the tokens before it, the seconds of training, and the loss.

    Seconds are rank 0's, of its steps alone: neither start-up nor evaluation, nor saving. of_step: of its parts,
    without the first step. sent_mib: by rank 0 in a step, as the sync counts it; wire_mib: by the busiest host in a
    step, as its network card counts it, None in memory. apart: what _APART calls it, and how it was when a line was
    written.
    """

    name: str
    settings: tuple[str, ...]
    status: str
    steps: int
    tokens: list[float]
    seconds: list[float]
    losses: list[float]
    train_s: float
    of_step: dict[str, float]
    sent_mib: float | None
    wire_mib: float | None
    apart: str
    apart_values: list[float]
    apart_tokens: list[float]
    sample_digest: str | None

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @property
    def loss(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def step_s(self) -> float:
        return sum(self.of_step.values())

    def seconds_to(self, loss: float) -> float | None:
        """Until the validation loss is first as low, between two evaluations on a straight line; None: never."""
        before = None
        for seconds, now in zip(self.seconds, self.losses, strict=True):
            if now <= loss:
                if before is None or before[1] == now:
                    return seconds
                share = (before[1] - loss) / (before[1] - now)
                return before[0] + share * (seconds - before[0])
            before = seconds, now
        return None


def read_result(
    name: str, settings: Sequence[str], run_dir: Path, exit_code: int, sent_bytes: int | None = None
) -> Result:
    """Of a run that has ended, however it did. sent_bytes: of the busiest host."""
    try:
        log = read_log(run_dir / "metrics.jsonl")
    except OSError:
        log = []
    summary = _summary(run_dir)
    lines = [line for line in log if line.get("kind") == "train"]
    evaluated = [line for line in log if line.get("kind") == "eval" and "val_loss" in line]
    steps, seconds, tokens, of_step = _times(lines)
    apart = next((key for key in _APART if any(key in line for line in lines)), "")
    met = [line for line in lines if apart in line]
    known = {EXIT_OK: "finished", EXIT_DIVERGED: "diverged"}
    return Result(
        name,
        tuple(settings),
        known.get(exit_code, f"failed ({exit_code})"),
        int(steps[-1]),
        [_between(steps, tokens, line["step"]) for line in evaluated],
        [_between(steps, seconds, line["step"]) for line in evaluated],
        [line["val_loss"] for line in evaluated],
        seconds[-1],
        of_step,
        summary.get("sent_mib", lines[-1].get("sent_mib") if lines else None),
        None if sent_bytes is None or not steps[-1] else sent_bytes / _MIB / steps[-1],
        _APART.get(apart, ""),
        [line[apart] for line in met],
        [float(line["tokens"]) for line in met],
        summary.get("sample_digest"),
    )


def _summary(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(run_dir / "summary.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _times(lines: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float], list[float], dict[str, float]]:
    """At each line, from step 0 on: steps, seconds and tokens until then; and seconds of a step, by its parts."""
    steps, seconds, tokens = [0.0], [0.0], [0.0]
    sums = dict.fromkeys(STEP_PARTS, 0.0)
    for line in lines:
        count = line["step"] - steps[-1]
        parts = {part: count * line[f"time_{part}_s"] for part in STEP_PARTS}
        if len(steps) > 1 or len(lines) == 1:  # the first line is of the first step, which warms up
            sums = {part: sums[part] + parts[part] for part in STEP_PARTS}
        steps.append(float(line["step"]))
        seconds.append(seconds[-1] + sum(parts.values()))
        tokens.append(float(line["tokens"]))
    measured = steps[-1] - (steps[1] if len(lines) > 1 else 0)
    return steps, seconds, tokens, {part: total / measured if measured else 0.0 for part, total in sums.items()}


def _between(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """On the line through the points, whose xs grow."""
    place = min(bisect_left(xs, x), len(xs) - 1)
    if place == 0 or xs[place] <= x:
        return ys[place]
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])


# --- telling -----------------------------------------------------------------------------------------------------


def table(results: Sequence[Result], title: str, facts: Sequence[str], notes: Sequence[str]) -> str:
    """Markdown. The first of the results is the baseline."""
    head = [
        "way to agree",
        "val loss",
        "to it",
        "s a step",
        "time",
        "to its loss",
        "MiB a step",
        "on the wire",
        "apart",
    ]
    rows = [_row(result, results[0]) for result in results]
    lines = [f"# {title}", "", *(f"{fact}  " for fact in facts), ""]
    lines += [_line(head), _line(["---"] + ["---:"] * (len(head) - 1)), *map(_line, rows), ""]
    base = results[0].name
    lines += [
        f"To it, time: against `{base}`, whose time is 1, for the same tokens. To its loss: the time in which a way "
        f"reaches the last validation loss of `{base}`, in the same unit; `-`: it does not. Times are of rank 0's "
        "steps, without start-up, evaluation and saving. MiB a step: what rank 0 sends, as the sync counts it; on the "
        "wire: what the busiest host's network card sent, all told, over all steps. Apart: how far the replicas (or "
        "the gradients from the weights) were apart at the last line.",
        "",
    ]
    lines += [f"- {_said(result)}" for result in results if result.settings]
    lines += ["", *(f"Note: {note}  " for note in notes)] if notes else []
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _said(result: Result) -> str:
    return f"`{result.name}`: {' '.join(result.settings)}"


def _row(result: Result, base: Result) -> list[str]:
    loss = "-" if result.loss is None else f"{result.loss:.4f}"
    if not result.is_finished:
        return [result.name, f"{loss} ({result.status})", *["-"] * 7]
    ahead = "" if result.loss is None or not base.loss else f"{result.loss / base.loss - 1:+.1%}"
    reached = None if base.loss is None or not base.train_s else result.seconds_to(base.loss)
    apart = f"{result.apart} {result.apart_values[-1]:.3g}" if any(result.apart_values) else "-"
    return [
        result.name,
        loss,
        ahead if result is not base else "",
        f"{result.step_s:.3g}",
        f"{result.train_s / base.train_s:.2f}" if base.train_s else "-",
        "-" if reached is None else f"{reached / base.train_s:.2f}",
        "-" if result.sent_mib is None else f"{result.sent_mib:.3g}",
        "-" if result.wire_mib is None else f"{result.wire_mib:.3g}",
        apart,
    ]


def digest_notes(results: Sequence[Result]) -> list[str]:
    """Did all see the same rows in the same order?"""
    found = {result.sample_digest for result in results if result.is_finished}
    if len(found) == 1:
        return [f"all have read the same rows in the same order (sample digest {found.pop()})"]
    by_name = ", ".join(f"{result.name} {result.sample_digest}" for result in results if result.is_finished)
    return [f"the ways have NOT read the same rows: sample digests {by_name}"] if found else []


def as_tree(result: Result) -> dict[str, Any]:
    """For machines, and for a comparison that goes on."""
    return asdict(result)


def from_tree(tree: Mapping[str, Any]) -> Result:
    """What ``as_tree`` made. Errors: TypeError, KeyError for anything else."""
    return Result(**{**tree, "settings": tuple(tree["settings"])})
