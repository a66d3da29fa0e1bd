"""One picture of a comparison.

validation loss against tokens  |  validation loss against time  |  which line is which
bytes a step | seconds of a step | consensus distance or staleness        a bar for each way
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvdtrain.commands.compare.results import Result
from hvdtrain.commands.page import png_of
from hvdtrain.files import write_bytes

_DASHES = ("-", "--", ":", "-.")
_COLORS = 10
_AGREEING = ("sync", "optimizer")  # parts of a step; weights are mixed where the optimizer moves them


def draw(results: Sequence[Result], title: str, picture: Path) -> None:
    """The first of the results is the baseline. Errors: OutputError."""
    from matplotlib.figure import Figure

    shown = [result for result in results if result.losses]
    height = 5 + max(2.6, 0.24 * len(shown) + 1.2)
    figure = Figure(figsize=(16, height), dpi=110, layout="constrained")
    curves, bars = figure.subfigures(2, 1, height_ratios=[5, height - 5])
    figure.suptitle(title, fontsize=11)
    _draw_losses(shown, curves)
    _draw_bars(shown, bars)
    write_bytes(picture, png_of(figure))


def _look(number: int) -> dict[str, Any]:
    """Of the number-th line: the baseline is black and thick."""
    if number == 0:
        return {"color": "black", "linestyle": "-", "lw": 2.4, "zorder": 3}
    number -= 1
    return {"color": f"C{number % _COLORS}", "linestyle": _DASHES[number // _COLORS % len(_DASHES)], "lw": 1.4}


def _draw_losses(results: Sequence[Result], part: Any) -> None:
    from matplotlib.ticker import EngFormatter

    by_tokens, by_time = part.subplots(1, 2, sharey=True)
    for number, result in enumerate(results):
        label = f"{result.name}  {result.losses[-1]:.3f}"
        by_tokens.plot(result.tokens, result.losses, marker="o", ms=2.5, label=label, **_look(number))
        by_time.plot(result.seconds, result.losses, marker="o", ms=2.5, **_look(number))
    by_tokens.set_xlabel("tokens")
    by_tokens.set_ylabel("validation loss (nats per token)")
    by_tokens.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M
    by_time.set_xlabel("seconds of training, without evaluation and saving")
    times = [result.seconds[-1] for result in results if result.seconds[-1] > 0]
    if times and max(times) > 10 * min(times):
        by_time.set_xscale("log")
    if results:
        by_tokens.set_ylim(*_window(results))
    part.legend(*by_tokens.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)


def _window(results: Sequence[Result]) -> tuple[float, float]:
    """Of losses: where the lines end, which lie far below their beginnings; what ends far above is cut off."""
    losses, ends = [loss for one in results for loss in one.losses], sorted(one.losses[-1] for one in results)
    lowest, highest, middle = min(losses), max(losses), ends[len(ends) // 2]
    top = min(max(1.35 * middle, min(ends[-1], 1.6 * middle)), highest)
    top += 0.03 * (top - lowest) or 0.1
    return lowest - 0.05 * (top - lowest), top


def _draw_bars(results: Sequence[Result], part: Any) -> None:
    sent, times, apart = part.subplots(1, 3, sharey=True)
    places = list(range(len(results)))
    colors = [_look(number)["color"] for number in places]
    mib = [result.sent_mib or 0.0 for result in results]
    sent.barh(places, mib, color=colors, height=0.7)
    on_wire = [(result.wire_mib, place) for result, place in zip(results, places, strict=True) if result.wire_mib]
    if on_wire:
        sent.plot(*zip(*on_wire, strict=True), linestyle="", marker="|", ms=11, mew=2, color="tab:red")
    known = [value for value in (*mib, *(value for value, _ in on_wire)) if value]
    least = 0.0
    if known and max(known) > 10 * min(known):
        least = min(known) / 2
        sent.set_xscale("log")
        sent.set_xlim(least, max(known) * 3)
    ends = [max(value, result.wire_mib or least) for value, result in zip(mib, results, strict=True)]
    _label(sent, ends, [f"{value:.3g}" for value in mib])
    sent.set_xlabel("MiB a step, of rank 0" + (" (red: on the wire, with all that is no step)" if on_wire else ""))
    agreeing = [sum(result.of_step[part] for part in _AGREEING) for result in results]
    rest = [result.step_s - seconds for result, seconds in zip(results, agreeing, strict=True)]
    times.barh(places, rest, color="tab:gray", height=0.7)
    times.barh(places, agreeing, left=rest, color="tab:red", height=0.7)
    times.set_xlabel("seconds a step (red: agreeing, with the optimizer)")
    _label(times, [result.step_s for result in results], [f"{result.step_s:.3g}" for result in results])
    ends = [result.apart_values[-1] if result.apart_values else 0.0 for result in results]
    apart.barh(places, ends, color=colors, height=0.7)
    apart.set_xlabel("consensus distance, or staleness, at the end")
    of_server = [" (staleness)" if result.apart == "staleness" else "" for result in results]
    _label(apart, ends, [f"{value:.3g}{unit}" if value else "" for value, unit in zip(ends, of_server, strict=True)])
    sent.set_yticks(places, [result.name for result in results], fontsize=9)
    sent.invert_yaxis()  # shared by all three


def _label(axes: Any, ends: Sequence[float], texts: Sequence[str]) -> None:
    """Behind the end of each bar."""
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(text, (end, place), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xmargin(0.15)
