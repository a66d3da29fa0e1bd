"""A link on which a small model has a large one's ratio of bytes to compute.

Both send gradients in proportion to their parameters P, and compute for t seconds a step. The shares of a step that go
into sending are alike where

    P / (B t)  =  P_large / (B_large t_large)        so        B = B_large  P / P_large  t_large / t

Without a ``t_large`` a step of the large model is taken to compute as long as one here: its machines are as much faster
as it is larger. With one, t is measured: a few steps in memory, what they wait for others not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.commands.compare.results import read_result
from hvdtrain.commands.ranks_here import Place
from hvdtrain.config import RunConfig
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.errors import EXIT_OK, ConfigError, LaunchError
from hvdtrain.machine.link import parse_bandwidth, show_bandwidth
from hvdtrain.planner.workload import workload

_STEPS = 40  # of the measurement
_SETTINGS = (
    f"train.steps={_STEPS}", "train.tokens=0", "train.epochs=0.0", "schedule.name=constant", "schedule.warmup_steps=0",
    "schedule.warmup_tokens=0", "schedule.warmup_epochs=0.0", "eval.every=0", "metrics.every=10",
)  # fmt: skip


@dataclass(frozen=True)
class Large:
    """The large model: its parameters, its link in tc's words, seconds that a step of it computes (0: as here)."""

    parameters: float = 0.0
    link: str = "100gbit"
    step_s: float = 0.0

    def __post_init__(self) -> None:
        parse_bandwidth(self.link, "--large-link")
        if self.parameters < 0 or self.step_s < 0:
            raise ConfigError("--as-large-as and --large-step: expected numbers above 0")

    @property
    def words(self) -> tuple[str, ...]:
        step = ("--large-step", f"{self.step_s:g}") if self.step_s else ()
        return ("--as-large-as", f"{self.parameters:g}", "--large-link", self.link, *step)


def scaled_bandwidth(
    large: Large, config: RunConfig, corpora: Corpora, place: Place, words: Sequence[str], folder: Path
) -> tuple[float, str]:
    """Bits a second, and how they were found. place: in memory; words: of the baseline's training.

    Errors: ConfigError where no link is as slow.
    """
    facts = CorpusFacts.of(corpora.manifest)
    parameters = workload(config, facts, place.ranks).trained
    share, time = parameters / large.parameters, 1.0
    how = f"{large.link} x {parameters:,} / {large.parameters:,.0f} parameters"
    if large.step_s:
        here_s = _compute_s(place, words, folder)
        time = large.step_s / here_s
        how += f" x {large.step_s:g} / {here_s:.3g} s that a step computes"
    bits_per_s = parse_bandwidth(large.link, "--large-link") * share * time
    parse_bandwidth(f"{bits_per_s:.0f}bit", "--bandwidth scaled, which comes to")
    return bits_per_s, f"scaled: {how} = {show_bandwidth(bits_per_s)}"


def _compute_s(place: Place, words: Sequence[str], folder: Path) -> float:
    run_dir = folder / "step"
    ran = place.train([*words, *_SETTINGS, "--run-dir", str(run_dir)], folder / "step.txt")
    if ran.exit_code != EXIT_OK:
        raise LaunchError(f"the measurement of a step ended with exit code {ran.exit_code}; see {folder / 'step.txt'}")
    parts = read_result("step", (), run_dir, EXIT_OK).of_step
    return sum(seconds for part, seconds in parts.items() if part != "sync")
