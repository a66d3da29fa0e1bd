"""What is compared: ways to agree, each of them a few settings on top of one recipe.

    --syncs diloco,local_sgd:every=4,optimizer=kept,gossip:topology=ring,every=2

names a mode of MODES, and two syncs (``sync.name``) with settings. Those behind a colon are options of the sync
(``every=4`` is ``sync.local_sgd.every=4``), or other keys of the recipe, with their dots; ``lr_times=0.3`` multiplies
the recipe's learning rates. What has a ``=`` and no colon before it goes on with the settings of the one before.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hvdtrain.config import RunConfig, flatten, load_config
from hvdtrain.cut.combinations import check_combination
from hvdtrain.data.corpora import Corpora
from hvdtrain.errors import ConfigError
from hvdtrain.sizing import check_shareable, epoch_tokens_of, feed_of, resolved, scaled, sized
from hvdtrain.sync import SYNCS, check_sync
from hvdtrain.tasks import make_task

BASELINE = "allreduce"
MODES = {
    BASELINE: "allreduce",
    "bf16": "allreduce:wire=bf16",
    "powersgd": "powersgd:rank=4",
    "topk": "topk:share=0.01",
    "sign": "sign:optim.name=sgd,optim.momentum=0.0,optim.clip_norm=0.0,lr_times=0.3",
    "local_2": "local_sgd:every=2",
    "local_8": "local_sgd:every=8",
    "post_local": "local_sgd:every=8,after_share=0.5",
    "slowmo": "local_sgd:every=8,outer=slowmo",
    "diloco": "local_sgd:every=16,outer=nesterov,optimizer=kept",
    "gossip_ring": "gossip:topology=ring",
    "gossip_one_peer": "gossip:topology=exponential",
    "average": "average",
    "server": "parameter_server",
    "async_server": "parameter_server:mode=asynchronous,servers=1",
}


@dataclass(frozen=True)
class Mode:
    """name: as it was asked for. settings: ``key=value`` of the recipe. lr_times: what multiplies its rates."""

    name: str
    settings: tuple[str, ...]
    lr_times: float = 1.0

    @property
    def said(self) -> tuple[str, ...]:
        """For people: all that is its own."""
        return (*self.settings, *([f"lr_times={self.lr_times:g}"] if self.lr_times != 1 else []))

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.=-]+", "_", self.name)


def parse_modes(texts: Sequence[str]) -> list[Mode]:
    """Of ``--syncs``, in order. Errors: ConfigError for a name that nobody has, or has twice."""
    entries: list[list[str]] = []
    for word in (word.strip() for text in texts for word in text.split(",")):
        if "=" in word.partition(":")[0]:
            if not entries:
                raise ConfigError(f"--syncs {word}: a setting before any name; expected NAME:{word}")
            entries[-1].append(word)
        else:
            name, _, setting = word.partition(":")
            entries.append([name, *([setting] if setting else [])])
    modes = [_mode(name, settings) for name, *settings in entries]
    for place in ("name", "folder"):
        found = [getattr(mode, place) for mode in modes]
        if twice := sorted({one for one in found if found.count(one) > 1}):
            raise ConfigError(f"--syncs: {twice[0]} is given twice")
    return modes


def _mode(name: str, settings: list[str]) -> Mode:
    if name in MODES:
        sync, _, own = MODES[name].partition(":")
        given = [*(own.split(",") if own else []), *settings]
    elif name in SYNCS:
        sync, given = name, settings
    else:
        syncs = ", ".join(sync for sync in SYNCS if sync not in MODES)
        raise ConfigError(
            f"--syncs: nobody agrees by {name!r}; there are: {', '.join(MODES)}; and, with settings of their own "
            f"(gossip:topology=torus), {syncs}"
        )
    found, times = [f"sync.name={sync}"], 1.0
    for setting in given:
        key, equals, value = setting.partition("=")
        if not equals or not key or not value:
            raise ConfigError(f"--syncs {name}:{setting}: expected KEY=VALUE behind the colon, like every=4")
        if key == "lr_times":
            times = _positive(value, f"--syncs {name}:{setting}")
        else:
            found.append(setting if "." in key else f"sync.{sync}.{setting}")
    return Mode(":".join([name, *filter(None, [",".join(settings)])]), tuple(found), times)


def _positive(text: str, where: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{where}: expected a number above 0")
    return number


# --- does it fit? ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitting:
    """A mode that fits the recipe and the ranks. settings: all that ``train`` is given; config: what comes of them."""

    mode: Mode
    settings: tuple[str, ...]
    config: RunConfig


def fit(mode: Mode, recipe: str, overrides: Sequence[str], ranks: int, corpora: Corpora) -> Fitting:
    """The mode on top of the recipe, looked at as ``train`` would; nothing is started.

    Errors: ConfigError, with the mode's name, for what ``train`` would refuse; DataError.
    """
    try:
        settings = [*overrides, *mode.settings]
        if mode.lr_times != 1:
            base = load_config(recipe, settings)
            settings.append(f"optim.lr={base.optim.lr * mode.lr_times:.6g}")
            settings.append(f"schedule.min_lr={base.schedule.min_lr * mode.lr_times:.6g}")
        config = load_config(recipe, settings)
        check_combination(flatten(config.model_dump()))
        return Fitting(mode, tuple(settings), _resolved(config, ranks, corpora))
    except ConfigError as error:
        raise ConfigError(f"{mode.name}: {error}") from None


def _resolved(recipe: RunConfig, ranks: int, corpora: Corpora) -> RunConfig:
    replicas = recipe.replicas_of(ranks)
    config = sized(recipe, replicas)
    check_shareable(config, replicas)
    feed, task = feed_of(config, 0, replicas), make_task(config.task)
    task.check(corpora, feed)
    epoch_tokens = epoch_tokens_of(config, task.open_training(corpora, feed).source)
    config = resolved(recipe, scaled(recipe, replicas, epoch_tokens))
    check_sync(config.sync, replicas, config.train.steps)
    return config


def check_equal(fittings: Sequence[Fitting]) -> None:
    """Errors: ConfigError where one would not see the rows that the first one sees."""
    first, *others = fittings
    for other in others:
        for key in ("steps", "global_batch", "global_tokens"):
            ours, theirs = (getattr(one.config.train, key) for one in (first, other))
            if ours != theirs:
                raise ConfigError(
                    f"{other.mode.name} would have train.{key}={theirs}, {first.mode.name} has {ours}: they do not "
                    "compare; leave such settings to the recipe"
                )
        if first.config.seed != other.config.seed:
            raise ConfigError(f"{other.mode.name} has another seed than {first.mode.name}: they do not compare")
