"""The report of a measurement: for people as a page and as a few lines, for programs as a tree."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvdtrain.commands.page import Block, Code, Facts, Heading, Page, Picture, Table, Text
from hvdtrain.commands.scaling.results import Beyond, Found, Result
from hvdtrain.errors import plural
from hvdtrain.planner.estimate import in_columns
from hvdtrain.planner.simulate import hours

_GIB, _MIB = 1 << 30, 1 << 20
_KINDS = {
    "strong": "Strong scaling: the global batch is the same at every size, so that a node has less and less of it.",
    "weak": "Weak scaling: the global batch grows with the nodes, so that a node's share stays the same.",
}


def as_tree(found: Found) -> dict[str, Any]:
    """For machines: seconds, bytes."""
    measured = [
        {
            "nodes": result.point.nodes,
            "ranks": result.point.ranks,
            "microbatches": result.run.microbatches,
            "step_s": result.run.step_s,
            "spread": result.run.spread,
            "parts_s": dict(result.run.parts),
            "tokens_per_s": result.tokens_per_s,
            "efficiency": found.efficiency(result.point.nodes, result.tokens_per_s),
            "memory_peak_mib": result.summary.get("memory_peak_mib"),
            "memory_planned_mib": round(result.point.plan.memory.total / _MIB, 1),
            "checkpoint_bytes": result.checkpoint_bytes,
            "save_s": result.summary.get("save_s"),
        }
        for result in found.results
    ]
    told = [
        {**asdict(one), "tokens_per_s": one.tokens_per_s, "efficiency": found.efficiency(one.nodes, one.tokens_per_s)}
        for one in found.beyond
    ]
    checked = None if found.checked is None else asdict(found.checked)
    return {"kind": found.series.kind, "measured": measured, "predicted": told, "largest_from_smaller": checked}


def as_text(found: Found) -> str:
    """What the command prints: the table of times, and what is told of the largest."""
    table = _times(found)
    return "\n".join([*in_columns([table.head, *table.rows]), *(f"  {said}" for said in _of_prediction(found))])


def as_page(found: Found, command: str, where: str, picture: bytes) -> Page:
    series = found.series
    blocks: list[Block] = [
        Text(f"{_KINDS[series.kind]} Times are medians over the lines of each run's log, without its first."),
        *([Text(where)] if where else []),
        Code(command),
        Heading("Hardware and software"),
        _machine(found),
        Heading("What was trained"),
        _workload(found),
        Heading("Speed"),
        _times(found),
        *(Text(said) for said in _of_prediction(found)),
        Picture("speed", picture, "Tokens a second and efficiency against nodes, and the parts of a step's time"),
        Heading("Where a step's time goes, seconds on rank 0"),
        _parts(found),
        Heading("The whole run"),
        _whole(found),
        Heading("Memory and files"),
        _memory(found),
        *_notes(found),
    ]
    return Page(f"Scaling of {Path(series.recipe).stem}: {series.kind}", blocks)


def _machine(found: Found) -> Facts:
    job, summary = found.results[-1].job, found.results[-1].summary
    versions = ", ".join(f"{name} {version}" for name, version in summary.get("versions", {}).items())
    rows = {
        "a node": job.get("machine"),
        "system": job.get("system"),
        "ranks a node": found.series.ranks_per_node,
        "threads a rank": summary.get("threads_per_rank"),
        "computing on": f"{summary.get('device')}, {summary.get('precision')} ({summary.get('matmul')})",
        "gradients travel by": f"{summary.get('backend')}, started by {summary.get('launcher')}",
        "software": versions,
        "commit": summary.get("git"),
    }
    return Facts([(name, str(value)) for name, value in rows.items() if value is not None])


def _workload(found: Found) -> Facts:
    load, config = found.whole.load, found.whole.config
    mesh = config.mesh
    first, last = found.results[0].run, found.results[-1].run
    batch = f"{first.tokens_of_step:,.0f} tokens"
    if found.series.kind == "weak":
        batch += f" on {plural(found.results[0].point.nodes, 'node')}, {last.tokens_of_step:,.0f} on the most"
    rows = [
        ("parameters", f"{load.parameters:,}"),
        ("task", f"{config.task.name}, rows of up to {load.positions:,} tokens"),
        ("global batch", batch),
        ("microbatch", plural(first.rows, "row")),
        ("a replica", f"mesh.tensor={mesh.tensor}, mesh.pipeline={mesh.pipeline}"),
        ("replicas agree by", config.sync.name),
        ("measured", f"{found.series.steps} steps at each size"),
        ("whole run", f"{load.tokens:,} tokens"),
    ]
    return Facts(rows)


def _times(found: Found) -> Table:
    head = ("nodes", "ranks", "microbatches", "step s", "spread", "tokens/s", "speed-up", "efficiency")
    rows = [_row_measured(found, result) for result in found.results]
    told = [_row_told(found, one) for one in found.beyond]
    return Table(head, [*rows, *told], frozenset(range(len(rows), len(rows) + len(told))))


def _row_measured(found: Found, result: Result) -> tuple[str, ...]:
    run, rate = result.run, result.tokens_per_s
    sizes = (f"{result.point.nodes:,}", f"{result.point.ranks:,}", f"{run.microbatches}")
    return (*sizes, f"{run.step_s:.4f}", f"{run.spread:.1%}", *_speeds(found, result.point.nodes, rate))


def _row_told(found: Found, one: Beyond) -> tuple[str, ...]:
    """Its interval stands where a measured one has its spread."""
    interval = f"{one.step.low:.4f}-{one.step.high:.4f}"
    sizes = (f"{one.nodes:,}", f"{one.ranks:,}", f"{one.microbatches}")
    return (*sizes, f"{one.step.seconds:.4f}", interval, *_speeds(found, one.nodes, one.tokens_per_s))


def _speeds(found: Found, nodes: int, rate: float) -> tuple[str, ...]:
    return f"{rate:,.0f}", f"{found.speed_up(rate):.2f}", f"{found.efficiency(nodes, rate):.0%}"


def _of_prediction(found: Found) -> list[str]:
    if len(found.results) < 2:
        return ["One size alone says nothing of larger ones: run the command again when a second one has finished."]
    texts = []
    if found.beyond:
        texts.append(
            f"Lines from {found.beyond[0].nodes} nodes on are predicted; {found.beyond[0].step.share:.0%} of such "
            "predictions hold within the interval. Fitted: a microbatch on n nodes takes a (1 + e log2 n + (u + s + "
            "c log2 n) / m), with m microbatches of a step, beginning from what is usual in published tables."
        )
    elif found.series.kind == "strong":
        texts.append("More nodes cannot share this batch: nothing is predicted beyond those that were measured.")
    if found.checked is not None:
        last = found.results[-1]
        error = found.checked.seconds / last.run.step_s - 1
        texts.append(
            f"Told from the smaller sizes alone, a step on {last.point.nodes} nodes would take "
            f"{found.checked.seconds:.4f} s ({found.checked.low:.4f} to {found.checked.high:.4f}); it took "
            f"{last.run.step_s:.4f}: {error:+.1%}."
        )
    return texts


def _parts(found: Found) -> Table:
    names = tuple(found.results[0].run.parts)
    rows = []
    for result in found.results:
        cells = (f"{seconds:.4f} ({seconds / result.run.step_s:.0%})" for seconds in result.run.parts.values())
        sent = result.summary.get("sent_mib")
        rows.append((f"{result.point.nodes:,}", *cells, "-" if sent is None else f"{sent:,.4g}"))
    return Table(("nodes", *names, "sent MiB a step"), rows)


def _whole(found: Found) -> Table:
    """By its tokens at each size's speed; failures, waiting and evaluation come on top (``plan --simulate``)."""
    rows = []
    sizes: Sequence[Result | Beyond] = [*found.results, *found.beyond]
    for one in sizes:
        nodes, rate = (one.nodes, one.tokens_per_s) if isinstance(one, Beyond) else (one.point.nodes, one.tokens_per_s)
        run_s = found.run_s(rate)
        span = "-"
        if isinstance(one, Beyond):
            ends = (found.run_s(one.tokens / seconds) * nodes / 3600 for seconds in (one.step.low, one.step.high))
            span = " to ".join(f"{value:,.4g}" for value in ends)
        rows.append((f"{nodes:,}", hours(run_s), f"{run_s * nodes / 3600:,.4g}", span))
    told = frozenset(range(len(found.results), len(rows)))
    return Table(("nodes", "time without a stop", "node hours", "80 % of predictions"), rows, told)


def _memory(found: Found) -> Table:
    head = ("nodes", "MiB a rank, peak", "planned", "a checkpoint", "written in", "start-up s", "shards")
    shards = sum(_size(path) for path in _shards(found))
    rows = []
    for result in found.results:
        summary = result.summary
        cells = (
            f"{summary.get('memory_peak_mib', 0):,.0f}",
            f"{result.point.plan.memory.total / _MIB:,.0f}",
            _bytes(result.checkpoint_bytes),
            _seconds(summary.get("save_s")),
            _seconds(summary.get("startup_s")),
            _bytes(shards),
        )
        rows.append((f"{result.point.nodes:,}", *cells))
    return Table(head, rows)


def _shards(found: Found) -> list[Path]:
    folders: Mapping[str, str] = found.results[0].job.get("data", {}).get("folders", {})
    return [path for folder in folders for path in Path(folder).glob("*.h5")]


def _size(path: Path) -> int:
    return path.stat().st_size


def _bytes(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.1f} MiB"


def _seconds(value: Any) -> str:
    return "-" if value is None else f"{value:,.1f} s"


def _notes(found: Found) -> list[Block]:
    every = found.whole.config.checkpoint.every
    notes = [f"The recipe saves every {plural(every, 'step')}; what these runs saved was their last step."] * (
        every > 0
    )
    notes += [note for result in found.results for note in result.summary.get("fallbacks", [])]
    if missing := len(found.series.nodes) - len(found.results):
        notes.append(f"{plural(missing, 'size')} of {len(found.series.nodes)} not finished yet.")
    return [Heading("Notes"), *(Text(note) for note in dict.fromkeys(notes))] if notes else []
