"""What is known of a cluster: planner/clusters/*.yaml, each figure with its source; or a file of one's own.

    name: My cluster
    figures:
      between_gb_per_s: {value: 100, source: "the centre's documentation: 4 x HDR200"}

``FIGURES`` is the table of what there is, in which unit, and between which bounds it makes sense.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from hvdtrain.errors import ConfigError
from hvdtrain.files import read_text
from hvdtrain.planner.collectives import Link
from hvdtrain.strict_yaml import parse_yaml


class Figure(NamedTuple):
    """low, high: what makes sense. default: None: it must be given."""

    meaning: str
    unit: str
    low: float
    high: float
    default: float | None = None


FIGURES: dict[str, Figure] = {
    "ranks_per_node": Figure("processes of a node, one a GPU", "ranks", 1, 1024),
    "memory_gib": Figure("of a rank", "GiB", 0.1, 4096),
    "tflops": Figure("that a rank reaches in training, in the recipe's precision", "TFLOP/s", 1e-3, 20_000),
    "tokens_for_half": Figure("of a microbatch with which a whole layer reaches half of tflops", "tokens", 0, 1e6, 0),
    "memory_gb_per_s": Figure("of a rank's memory", "GB/s", 1, 50_000),
    "inside_gb_per_s": Figure("from a rank to another on its node", "GB/s", 0.01, 10_000),
    "inside_us": Figure("latency between two ranks of a node", "microseconds", 0.05, 10_000),
    "between_gb_per_s": Figure("from a node to others, all of its adapters", "GB/s", 1e-3, 10_000),
    "between_us": Figure("latency between two nodes", "microseconds", 0.2, 100_000),
    "operation_us": Figure("to begin an exchange, however small", "microseconds", 0, 100_000, 1000),
    "growth_s": Figure("that every doubling of the nodes adds to a step beyond the links", "seconds", 0, 10, 0),
    "jitter": Figure("deviation of a rank's time, relative", "of 1", 0, 1, 0),
    "save_gb_per_s": Figure("written to the file system by all ranks", "GB/s", 1e-3, 1e6),
    "failures_per_rank_day": Figure("that stop a job", "a rank and day", 0, 1, 0),
    "restart_s": Figure("from a job's first second to its first step", "seconds", 0, 86_400, 300),
    "requeue_s": Figure("from the loss of a rank to the next job", "seconds", 0, 30 * 86_400, 300),
    "watts_per_node": Figure("under load; 0: not known", "watts", 0, 200_000, 0),
}
# What a wrong unit would have to be multiplied by.
_SLIPS = {
    "microseconds": {"in seconds": 1e6, "in milliseconds": 1e3, "in nanoseconds": 1e-3},
    "GB/s": {"in bytes/s": 1e-9, "in MB/s": 1e-3},
    "TFLOP/s": {"in FLOP/s": 1e-12, "in GFLOP/s": 1e-3},
    "GiB": {"in bytes": 2.0**-30, "in MiB": 2.0**-10},
}


@dataclass(frozen=True)
class Cluster:
    name: str
    figures: Mapping[str, float]
    sources: Mapping[str, str]

    def __getitem__(self, name: str) -> float:
        return self.figures[name]

    @property
    def inside(self) -> Link:
        return Link(self["inside_us"] * 1e-6, self["inside_gb_per_s"] * 1e9)

    @property
    def between(self) -> Link:
        return Link(self["between_us"] * 1e-6, self["between_gb_per_s"] * 1e9)

    def flops_per_s(self, tokens: float) -> float:
        """Of a rank, in microbatches of so many tokens."""
        return self["tflops"] * 1e12 * tokens / (tokens + self["tokens_for_half"])


def cluster_names() -> list[str]:
    folder = resources.files("hvdtrain") / "planner" / "clusters"
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def read_cluster(name: str) -> Cluster:
    """One of ``cluster_names``, or a file, where ``name`` is a path (it has a slash or ends in .yaml).

    Errors: ConfigError, one message for all that is wrong in it.
    """
    if "/" in name or name.endswith((".yaml", ".yml")):
        try:
            text = read_text(Path(name))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read cluster file {name}: {getattr(error, 'strerror', error)}") from None
    elif name in cluster_names():
        text = (resources.files("hvdtrain") / "planner" / "clusters" / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        known = ", ".join(cluster_names())
        raise ConfigError(f"no cluster {name!r}; there are: {known}; or give a path to a .yaml file")
    return make_cluster(parse_yaml(text, f"cluster {name}"), f"cluster {name}")


def make_cluster(tree: Any, origin: str) -> Cluster:
    """Errors: see ``read_cluster``."""
    if not (isinstance(tree, dict) and isinstance(tree.get("figures"), dict)) or set(tree) - {"name", "figures"}:
        raise ConfigError(f"{origin}: expected `name` and `figures`, each figure as {{value: NUMBER, source: TEXT}}")
    given, problems = tree["figures"], []
    for name in given:
        if name not in FIGURES:
            near = difflib.get_close_matches(str(name), FIGURES, 1)
            problems.append(f"unknown figure {name!r}; " + (f"did you mean {near[0]}?" if near else _known()))
    figures: dict[str, float] = {}
    sources: dict[str, str] = {}
    for name, figure in FIGURES.items():
        if name in given:
            problem = _problem(name, figure, given[name])
            if problem:
                problems.append(problem)
            else:
                figures[name], sources[name] = float(given[name]["value"]), given[name]["source"]
        elif figure.default is None:
            problems.append(f"{name} is missing: {figure.meaning}, {_range(figure)}")
        else:
            figures[name], sources[name] = figure.default, "assumed"
    if problems:
        raise ConfigError(f"{origin}: " + "; ".join(problems))
    return Cluster(str(tree.get("name") or origin), figures, sources)


def _problem(name: str, figure: Figure, given: Any) -> str:
    if not isinstance(given, dict) or set(given) != {"value", "source"} or not str(given["source"] or "").strip():
        return f"{name}: expected {{value: NUMBER, source: TEXT}}; a figure without a source is a guess"
    value = given["value"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name}: expected a number, {_range(figure)}, got {value!r}"
    if figure.low <= value <= figure.high:
        whole = figure.unit != "ranks" or value == int(value)
        return "" if whole else f"{name} {value:g}: expected a whole number of ranks"
    slips = [
        f"{value * factor:g} if it is {how}"
        for how, factor in _SLIPS.get(figure.unit, {}).items()
        if figure.low <= value * factor <= figure.high
    ]
    hint = f" (it would be {' and '.join(slips)})" if slips else ""
    return f"{name} {value:g}: expected {_range(figure)}{hint}"


def _range(figure: Figure) -> str:
    return f"{figure.low:g} to {figure.high:,g} {figure.unit}"


def _known() -> str:
    return f"there are: {', '.join(FIGURES)}"
