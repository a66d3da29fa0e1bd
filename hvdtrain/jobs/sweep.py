"""The same recipe at several settings: every combination is a run of its own, in turn here or as a Slurm array's task.

    hvdtrain sweep demo --vary train.global_batch=16,32,64 --vary scaling.rule=none,sqrt --out runs/batches

    runs/batches/global_batch-16_rule-none/     an ordinary run folder each; given again, the sweep goes on
                 global_batch-16_rule-sqrt/     where it stopped, as every run does
                 ...

The first ``--vary`` changes slowest. ``hvdtrain report runs/batches/*`` gathers what there is.
"""

import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hvdtrain.comm.ancestors import signal_at_parents_end
from hvdtrain.comm.world import World
from hvdtrain.config import flatten, load_config
from hvdtrain.cut.combinations import check_combination
from hvdtrain.errors import EXIT_DIVERGED, EXIT_OK, EXIT_STOPPED_EARLY, ConfigError, LaunchError, say


@dataclass(frozen=True)
class Point:
    """One combination: ``name`` of its run folder, and the settings that make it."""

    name: str
    settings: tuple[str, ...]


def sweep(
    recipe: str,
    overrides: Sequence[str],
    vary: Sequence[str],
    out: Path,
    launcher: str,
    only: int | None,
    world: World,
) -> int:
    """Train every point, or with ``only`` that one, counted from 0.

    Returns the first exit code that is neither "finished" nor "diverged": here a run that diverges is a result. 0:
    there is none. After a run that stopped early no other is begun.

    launcher: words before ``python -m hvdtrain train``, such as "horovodrun -np 4"; empty: one process.
    Errors: ConfigError for settings that some point cannot have, before any is begun; LaunchError under a launcher.
    """
    if world.size > 1:
        raise LaunchError(f"sweep starts the ranks itself (--launcher); {world.launcher} started {world.size} of it")
    points = points_of(vary)
    if only is not None and not 0 <= only < len(points):
        raise ConfigError(f"--point {only}: there are {len(points)} points, 0 to {len(points) - 1}")
    for point in points:
        config = load_config(recipe, [*overrides, *point.settings], [out / point.name])
        check_combination(flatten(config.model_dump()))
    codes = []
    for number, point in enumerate(points):
        if only in (None, number):
            print(f"hvdtrain: point {number} of {len(points)}: {' '.join(point.settings)}", flush=True)
            codes.append(_train(recipe, [*overrides, *point.settings], out / point.name, launcher))
            if codes[-1] == EXIT_STOPPED_EARLY:
                break
    return next((code for code in codes if code not in (EXIT_OK, EXIT_DIVERGED)), EXIT_OK)


def _train(recipe: str, settings: Sequence[str], run_dir: Path, launcher: str) -> int:
    """Train one point; returns its exit code. A TERM is handed on to the run, which then stops early. It also stops
    early when this process is killed, and upon Ctrl-C, which the terminal sends to both.
    """
    words = [*shlex.split(launcher), sys.executable, "-m", "hvdtrain", "train", recipe, *settings]
    told = False
    try:
        run = subprocess.Popen(
            [*words, "--run-dir", str(run_dir)], preexec_fn=lambda: signal_at_parents_end(signal.SIGTERM)
        )
    except OSError as error:
        raise LaunchError(f"--launcher: cannot start {words[0]}: {error.strerror}") from None

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal told
        told = True
        if number == signal.SIGTERM:
            run.terminate()

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as Ctrl-C in the background, by the run too
            signal.signal(number, hand_on)
    try:
        code = run.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        say(f"{run_dir} ended with exit code {code}")
    return EXIT_STOPPED_EARLY if told else code


def points_of(vary: Sequence[str]) -> list[Point]:
    """Every combination of ``KEY=VALUE,VALUE...``. Errors: ConfigError for none, or the same twice."""
    axes: list[tuple[str, list[str]]] = []
    for words in vary:
        key, _, values = words.partition("=")
        if not key or not values or "" in values.split(","):
            raise ConfigError(f"--vary {words}: expected KEY=VALUE,VALUE..., like train.global_batch=16,32")
        axes.append((key, values.split(",")))
    keys = [key for key, _ in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--vary: a key is given twice: {', '.join(keys)}")
    short = [key.rpartition(".")[2] for key in keys]
    names = [part if short.count(part) == 1 else key for key, part in zip(keys, short, strict=True)]
    points = []
    for values in itertools.product(*(values for _, values in axes)):
        name = "_".join(f"{name}-{value.replace('/', '-')}" for name, value in zip(names, values, strict=True))
        points.append(Point(name, tuple(f"{key}={value}" for key, value in zip(keys, values, strict=True))))
    if len({point.name for point in points}) < len(points):
        raise ConfigError("--vary: a value is given twice")
    return points
