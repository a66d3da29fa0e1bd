"""What one or several runs came to: a table on the terminal and ``loss.png``."""

import json
import math
import os
from pathlib import Path
from typing import Any

from hvdtrain.checkpoint.retention import folder_of, steps_saved
from hvdtrain.commands.page import png_of
from hvdtrain.errors import CheckpointError, OutputError, plural
from hvdtrain.files import make_folder, read_text, seen, write_bytes
from hvdtrain.watch.log_file import read_log


def report(run_dirs: list[Path], out: Path | None) -> str:
    """Draw the loss curves of the runs into ``out`` (default: ``loss.png`` in the first run) and return the table."""
    runs = read_all(run_dirs)
    picture = out or run_dirs[0] / "loss.png"
    try:
        make_folder(picture.parent)
        write_bytes(picture, draw_losses(runs))
    except OSError as error:
        raise OutputError(f"cannot write {picture}: {error.strerror or error}") from None
    lines = [_table(runs), "", f"loss curve   {picture}"]
    for run in runs:
        lines += advice_on(run)
        saved = steps_saved(run["dir"])
        board = run["dir"] / "tensorboard"
        lines += [f"tensorboard  {board}"] if seen(board) else []
        lines += [f"checkpoint   {folder_of(run['dir'], saved[0])}"] if saved else []
    return "\n".join(lines)


def read_all(run_dirs: list[Path]) -> list[dict[str, Any]]:
    """Errors: CheckpointError for a folder that is no run."""
    return [_read(run_dir, name) for run_dir, name in zip(run_dirs, _names(run_dirs), strict=True)]


def _names(run_dirs: list[Path]) -> list[str]:
    """What a legend calls the runs: their folders' names, or as much of the paths as tells them apart."""
    paths = [path.resolve() for path in run_dirs]
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def _read(run_dir: Path, name: str) -> dict[str, Any]:
    path = run_dir / "metrics.jsonl"
    try:
        log = read_log(path)
    except OSError as error:
        raise CheckpointError(f"{run_dir} is not a run folder: cannot read {path.name}: {error.strerror}") from None
    try:
        summary = json.loads(read_text(run_dir / "summary.json"))
    except (OSError, ValueError):
        summary = None
    return {
        "dir": run_dir,
        "name": name,
        "train": [line for line in log if line.get("kind") == "train" and line.get("loss") is not None],
        "eval": [line for line in log if line.get("kind") == "eval" and "val_loss" in line],
        "summary": summary if isinstance(summary, dict) else {"status": "unfinished"},
    }


def _table(runs: list[dict[str, Any]]) -> str:
    rows = table_of(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def table_of(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each run; the first is the head."""
    head = ["run", "status", "step", "tokens", "val loss", "best", "tokens/s", "MFU", "ranks", "sample digest"]
    rows = [[*head, "tokens/update", "lr"]]
    winner = _best(runs)
    for run in runs:
        summary = run["summary"]
        last = (run["train"] or [{}])[-1]
        val = (run["eval"] or [{}])[-1].get("val_loss")
        mfu = summary.get("mfu", last.get("mfu"))
        best = min((line["val_loss"] for line in run["eval"]), default=None)
        rows.append(
            [
                str(run["dir"]),
                str(summary.get("status")),
                f"{summary.get('step', last.get('step', 0)):,}",
                f"{summary.get('tokens', last.get('tokens', 0)):,}",
                "-" if val is None else f"{val:.4f}{' *' if run is winner else ''}",
                "-" if best is None else f"{best:.4f}",
                f"{summary.get('tokens_per_s', last.get('tokens_per_s', 0)):,.0f}",
                "-" if mfu is None else f"{mfu:.1%}",
                str(summary.get("world_size", "-")),
                str(summary.get("sample_digest", "-")),
                "-" if (batch := _tokens_per_update(run)) is None else f"{batch:,.0f}",
                "-" if (lr := max((p.get("lr", 0.0) for p in run["train"]), default=0.0)) == 0 else f"{lr:.3g}",
            ]
        )
    return rows


def advice_on(run: dict[str, Any]) -> list[str]:
    """What the noise of a run's gradients says of its batch."""
    train, summary = run["train"], run["summary"]
    noise = next((p["noise_scale_tokens"] for p in reversed(train) if "noise_scale_tokens" in p), None)
    if noise is None and (why := summary.get("noise_scale_note")):
        return [f"batch        {run['name']}: no noise scale: {why}"]
    batch, ranks = _tokens_per_update(run), summary.get("replicas", summary.get("world_size"))
    if noise is None or batch is None or not isinstance(ranks, int):
        return []
    return [f"batch        {run['name']}: {advice(noise, batch, ranks)}"]


def advice(noise: float, batch: float, ranks: int) -> str:
    """One sentence: what a run at ``batch`` targets an update, shared by ``ranks``, pays for its size (1812.06162)."""
    limit = max(1, math.floor(noise / (batch / ranks)))
    share = batch / noise
    more = f"{100 * share:.0f} % more tokens than at" if share <= 1 else f"{1 + share:.1f} times the tokens of"
    return (
        f"critical batch about {_round(noise):,} tokens; at {batch:,.0f} tokens an update the run needs "
        f"{more} a small one; beyond {plural(limit, 'rank', ',')} "
        "with as much each, more of the allocation is wasted than gained"
    )


def _round(number: float) -> int:
    """To two digits: more are not known."""
    return int(float(f"{number:.1e}"))


def _tokens_per_update(run: dict[str, Any]) -> float | None:
    last = (run["train"] or [{}])[-1]
    return last["tokens"] / last["step"] if "tokens" in last else None


def draw_losses(runs: list[dict[str, Any]]) -> bytes:
    """As PNG. One run: loss against steps. Several: validation loss against tokens, steps and time, the best marked."""
    from matplotlib.figure import Figure

    several = len(runs) > 1
    figure = Figure(figsize=(14, 5) if several else (8, 5), dpi=120, layout="constrained")
    if several:
        _draw_several(runs, figure.subplots(1, 3, sharey=True))
    else:
        _draw_one(runs[0], figure.add_subplot())
    return png_of(figure)


def _draw_one(run: dict[str, Any], axes: Any) -> None:
    name, train, val = run["name"], run["train"], run["eval"]
    steps, losses = [p["step"] for p in train], [p["loss"] for p in train]
    axes.plot(steps, losses, color="C0", alpha=0.45, lw=1, label=f"{name}: training")
    if val:
        steps, losses = [p["step"] for p in val], [p["val_loss"] for p in val]
        label = f"{name}: validation ({val[-1]['val_loss']:.3f})"
        axes.plot(steps, losses, color="C0", marker="o", ms=4, label=label)
    axes.set_xlabel("step (optimizer updates)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)


def _draw_several(runs: list[dict[str, Any]], panels: Any) -> None:
    from matplotlib.ticker import EngFormatter

    best = _best(runs)
    for axes, measure, label in zip(panels, ("tokens", "step", "wall_s"), _MEASURES, strict=True):
        for number, run in enumerate(runs):
            val, name = run["eval"], run["name"]
            points = [(x, p["val_loss"]) for p in val if (x := _where(run, p["step"], measure)) is not None]
            if not points:
                continue
            color, end = f"C{number % 10}", f" ({val[-1]['val_loss']:.3f})"
            line = ("-", "--", ":")[number // 10 % 3]
            axes.plot(*zip(*points, strict=True), line, color=color, marker="o", ms=3, lw=1.2, label=name + end)
            if run is best:
                axes.plot(*points[-1], marker="*", ms=14, color=color, label="best")
        axes.set_xlabel(label)
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[1].legend(frameon=False, fontsize=7 if len(runs) > 6 else 9)


_MEASURES = ("tokens", "step (optimizer updates)", "time (s, this run's processes)")


def _where(run: dict[str, Any], step: int, measure: str) -> float | None:
    """What the log says of ``measure`` at ``step``: of its last line until then."""
    if measure == "step":
        return step
    lines = [p for p in run["train"] if p["step"] <= step and measure in p]
    return lines[-1][measure] if lines else None


def _best(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The run that ended with the lowest validation loss; None where fewer than two were evaluated."""
    ended = [run for run in runs if run["eval"]]
    return min(ended, key=lambda run: run["eval"][-1]["val_loss"]) if len(ended) > 1 else None
