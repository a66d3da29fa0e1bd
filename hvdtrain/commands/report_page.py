"""``hvdtrain report --html``: what runs came to, curves, times by part, events and settings that differ, as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hvdtrain.commands.page import Block, Facts, Heading, Page, Picture, Table, Text, png_of, write_page
from hvdtrain.commands.report import advice_on, draw_losses, read_all, table_of
from hvdtrain.errors import plural
from hvdtrain.jobs.slurm import job_records
from hvdtrain.watch.log_file import STEP_PARTS

Run = dict[str, Any]  # as commands/report.py reads it


def report_page(run_dirs: list[Path], out: Path | None) -> str:
    """Write the page beside ``out``, whose ending does not count (default: report in the first run folder).

    Returns what the user wants to know: the files. Errors: CheckpointError for a folder that is no run; OutputError.
    """
    path = (out or run_dirs[0] / "report").with_suffix("")
    return "\n".join(str(file) for file in write_page(page_of(read_all(run_dirs)), path))


def page_of(runs: Sequence[Run]) -> Page:
    head, *rows = table_of(list(runs))
    jobs = {run["name"]: job_records(run["dir"]) for run in runs}
    blocks: list[Block] = [
        Table(head, [(run["name"], *row[1:]) for run, row in zip(runs, rows, strict=True)]),
        *(Text(line.removeprefix("batch").strip()) for run in runs for line in advice_on(run)),
        Heading("Loss"),
        Picture("loss", draw_losses(list(runs)), "Loss against steps, tokens and time"),
        *_of_times(runs),
        Heading("Events"),
        _events(runs, jobs),
        *_of_settings(runs, jobs),
        Heading("Where they ran"),
        *_places(runs, jobs),
    ]
    return Page(f"Runs: {', '.join(run['name'] for run in runs)}", blocks)


# --- times -------------------------------------------------------------------------------------------------------


def _of_times(runs: Sequence[Run]) -> list[Block]:
    timed = [run for run in runs if _timed(run)]
    if not timed:
        return []
    rows = []
    for run in timed:
        lines = _timed(run)
        seconds = [median(line[f"time_{part}_s"] for line in lines) for part in STEP_PARTS]
        whole = sum(seconds) or 1.0
        memory = max((line["memory_peak_mib"] for line in lines if line.get("memory_peak_mib")), default=None)
        cells = (f"{value:.4f} ({value / whole:.0%})" for value in seconds)
        rows.append((run["name"], *cells, f"{sum(seconds):.4f}", "-" if memory is None else f"{memory:,.0f}"))
    head = ("run", *STEP_PARTS, "a step", "memory MiB")
    return [
        Heading("Where a step's time goes, seconds on rank 0, in the median"),
        Table(head, rows),
        Picture("times", _draw_times(timed), "Seconds of a step by part, over the steps of each run"),
    ]


def _timed(run: Run) -> list[Mapping[str, Any]]:
    """Lines with times; without the first, which holds the start-up, where there are others."""
    lines = [line for line in run["train"] if all(f"time_{part}_s" in line for part in STEP_PARTS)]
    return lines[1:] or lines


def _draw_times(runs: Sequence[Run]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * max(2, min(3, len(runs))), 3.4 * -(-len(runs) // 3)), dpi=110, layout="constrained")
    panels = figure.subplots(-(-len(runs) // 3), min(3, len(runs)), squeeze=False, sharey=True).flatten()
    for axes, run in zip(panels, runs, strict=False):
        lines = _timed(run)
        seconds = [[line[f"time_{part}_s"] for line in lines] for part in STEP_PARTS]
        axes.stackplot([line["step"] for line in lines], seconds, labels=STEP_PARTS, lw=0)
        axes.set_title(run["name"], fontsize=10)
        axes.set_xlabel("step")
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("seconds of a step")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(STEP_PARTS), frameon=False
    )
    return png_of(figure)


# --- events ------------------------------------------------------------------------------------------------------


def _events(runs: Sequence[Run], jobs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Block:
    """In the order in which they happened in each run."""
    rows = [(run["name"], *event) for run in runs for event in [*_of_jobs(jobs[run["name"]]), *_of_log(run)]]
    return Table(("run", "step", "when", "what"), rows, words=True) if rows else Text("None is known of.")


def _of_jobs(jobs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    events = []
    for number, job in enumerate(jobs):
        size = f"{plural(job.get('world_size', 0), 'rank')} on {plural(len(job.get('nodes', {})), 'node')}"
        name = f"job {job['job_id']}" if job.get("job_id") else "a job"
        begun = "began" if number == 0 else "went on"
        events.append((f"{job.get('step_began', 0):,}", str(job.get("started", "-")), f"{name} {begun}, {size}"))
        if "ended" in job:
            end = f"{name} ended: {job.get('reason', 'no reason known')} (exit code {job.get('exit_code')})"
            events.append((f"{job.get('step_ended', 0):,}", str(job["ended"]), end))
        elif number < len(jobs) - 1:
            events.append(("?", "?", f"{name} ended without a word"))
    return events


def _of_log(run: Run) -> list[tuple[str, str, str]]:
    events, skipped = [], 0
    for line in run["train"]:
        if (now := line.get("skipped_steps", skipped)) > skipped:
            events.append((f"{line['step']:,}", "-", f"{now - skipped} skipped by the guard until here"))
        skipped = now
    return [*events, *(("-", "-", f"note: {note}") for note in run["summary"].get("fallbacks") or [])]


# --- settings ----------------------------------------------------------------------------------------------------


def _of_settings(runs: Sequence[Run], jobs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Block]:
    from hvdtrain.config import flatten

    known = [(run["name"], flatten(jobs[run["name"]][-1].get("config", {}))) for run in runs if jobs[run["name"]]]
    if len(known) < 2:
        return []
    keys = list(dict.fromkeys(key for _, settings in known for key in settings))
    rows = []
    for key in keys:
        values = [str(settings.get(key, "-")) for _, settings in known]
        if len(set(values)) > 1:
            rows.append((key, *values))
    table = (
        Table(("setting", *(name for name, _ in known)), rows, words=True)
        if rows
        else Text("All settings are the same.")
    )
    return [Heading("Settings that differ"), table]


def _places(runs: Sequence[Run], jobs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Block]:
    blocks: list[Block] = []
    for run in runs:
        job, summary = (jobs[run["name"]] or [{}])[-1], run["summary"]
        versions = ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items())
        facts = {
            "run": run["name"],
            "command": " ".join(job.get("command", [])),
            "machine": job.get("machine"),
            "hosts": ", ".join(job.get("hosts", [])),
            "ranks": f"{job['world_size']} ({job.get('launcher')}, {job.get('backend')})" if job else None,
            "software": versions,
            "commit": summary.get("git"),
        }
        blocks.append(Facts([(name, str(said)) for name, said in facts.items() if said]))
    return blocks
