"""tokens a second against nodes, with the ideal line  |  efficiency  |  where a step's time goes"""

from typing import Any

from hvdtrain.commands.page import png_of
from hvdtrain.commands.scaling.results import Found

_MEASURED, _TOLD = "black", "tab:blue"


def draw(found: Found) -> bytes:
    """As PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), dpi=110, layout="constrained")
    speed, efficiency, parts = figure.subplots(1, 3)
    _draw_speed(found, speed)
    _draw_efficiency(found, efficiency)
    _draw_parts(found, parts)
    return png_of(figure)


def _draw_speed(found: Found, axes: Any) -> None:
    from matplotlib.ticker import LogLocator

    nodes = [result.point.nodes for result in found.results]
    rates = [result.tokens_per_s for result in found.results]
    ends = [nodes[0], found.beyond[-1].nodes if found.beyond else nodes[-1]]
    axes.plot(ends, [rates[0] * end / nodes[0] for end in ends], color="gray", ls="--", lw=1, label="ideal")
    axes.plot(nodes, rates, color=_MEASURED, marker="o", label="measured")
    if found.beyond:
        sizes, (middle, low, high) = _told(found)
        axes.plot(sizes, middle, color=_TOLD, marker="o", mfc="white", label="predicted", zorder=1)
        axes.fill_between(sizes, low, high, color=_TOLD, alpha=0.2, lw=0, label=f"{_share(found)} interval")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("tokens a second")
    axes.legend(frameon=False)
    _number_nodes(found, axes)


def _draw_efficiency(found: Found, axes: Any) -> None:
    nodes = [result.point.nodes for result in found.results]
    shares = [found.efficiency(result.point.nodes, result.tokens_per_s) for result in found.results]
    axes.axhline(1, color="gray", ls="--", lw=1)
    axes.plot(nodes, shares, color=_MEASURED, marker="o")
    if found.beyond:
        sizes, curves = _told(found)
        middle, low, high = (
            [found.efficiency(size, rate) for size, rate in zip(sizes, curve, strict=True)] for curve in curves
        )
        axes.plot(sizes, middle, color=_TOLD, marker="o", mfc="white", zorder=1)
        axes.fill_between(sizes, low, high, color=_TOLD, alpha=0.2, lw=0)
    axes.set_ylim(0, max(1.1, 1.05 * max(shares)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_ylabel("efficiency")
    _number_nodes(found, axes)


def _told(found: Found) -> tuple[list[int], list[list[float]]]:
    """Sizes from the largest measured one on, and tokens a second there: the middle, the low end, the high end."""
    last = found.results[-1]
    curves = [
        [last.tokens_per_s, *(one.tokens / seconds for one, seconds in zip(found.beyond, ends, strict=True))]
        for ends in zip(*((one.step.seconds, one.step.high, one.step.low) for one in found.beyond), strict=True)
    ]
    return [last.point.nodes, *(one.nodes for one in found.beyond)], curves


def _draw_parts(found: Found, axes: Any) -> None:
    places = range(len(found.results))
    bottom = [0.0] * len(found.results)
    for number, part in enumerate(found.results[0].run.parts):
        seconds = [result.run.parts[part] for result in found.results]
        if max(seconds) > 0.001 * max(result.run.step_s for result in found.results):
            axes.bar(places, seconds, 0.65, bottom=bottom, label=part, color=f"C{number}")
        bottom = [below + height for below, height in zip(bottom, seconds, strict=True)]
    axes.set_xticks(list(places), [str(result.point.nodes) for result in found.results])
    axes.set_xlabel("nodes")
    axes.set_ylabel("seconds of a step")
    axes.set_ylim(0, 1.25 * max(bottom))
    axes.legend(frameon=False, ncols=2)


def _number_nodes(found: Found, axes: Any) -> None:
    sizes = [*(result.point.nodes for result in found.results), *(one.nodes for one in found.beyond)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("nodes")


def _share(found: Found) -> str:
    return f"{found.beyond[0].step.share:.0%}"
