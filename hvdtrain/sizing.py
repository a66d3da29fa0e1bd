"""The sizes of a run: what a recipe says of batch, rates and lengths, on a number of replicas.

A replica is a rank, or several that share one model (mesh.*): they see the same rows.

recipe     as it was given; its batch may be that of one replica, its length in tokens or epochs
sized      with the batch of all replicas; enough to lay out batches, before the data are open
resolved   with rates and lengths for that batch, in steps, once an epoch's tokens are known
"""

from hvdtrain.config import RunConfig
from hvdtrain.data.loader import Feed, Source
from hvdtrain.data.ramp import Ramp
from hvdtrain.errors import ConfigError
from hvdtrain.optim.scaling import Scaled, Unscaled, scale, update_size
from hvdtrain.optim.schedules import Length
from hvdtrain.tasks import TASKS


def sized(recipe: RunConfig, replicas: int) -> RunConfig:
    """With the batch of so many replicas (scaling.per_rank). Errors: ConfigError where that is no whole number."""
    rows, tokens = update_size(recipe.scaling, recipe.train.global_batch, recipe.train.global_tokens, replicas)
    train = recipe.train.model_copy(update={"global_batch": rows, "global_tokens": tokens})
    return recipe.model_copy(update={"train": train})


def scaled(recipe: RunConfig, replicas: int, epoch_tokens: int) -> Scaled:
    """Batch, rates and lengths that so many replicas use, of a recipe as it was given; see optim/scaling.py.

    epoch_tokens: of the corpus; 0: not known.
    """
    train, ramp = recipe.train, ramp_of(sized(recipe, replicas))
    given = Unscaled(
        recipe.scaling,
        recipe.optim,
        recipe.schedule,
        Length("train.", train.steps, train.tokens, train.epochs),
        recipe.model.context,
        train.global_batch,
        train.global_tokens,
    )
    lengthened = None if ramp is None else lambda steps: ramp.steps_to(steps * ramp.full)
    return scale(given, replicas, epoch_tokens, lengthened)


def epoch_tokens_of(config: RunConfig, source: Source) -> int:
    """Tokens of an epoch, in the unit of the batch of ``config``, which is ``sized``."""
    update_tokens = config.train.global_tokens or config.train.global_batch * config.model.context
    return source.rows_per_epoch * update_tokens // source.rows_per_step


def resolved(recipe: RunConfig, found: Scaled) -> RunConfig:
    """With what ``scaled`` found, lengths in steps."""
    train = {"steps": found.steps, "global_batch": found.global_batch, "global_tokens": found.global_tokens}
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={**train, "tokens": 0, "epochs": 0.0}),
            "optim": found.optim(recipe.optim),
            "schedule": found.schedule(recipe.schedule),
        }
    )


def ramp_of(config: RunConfig) -> Ramp | None:
    """How the batch of ``config``, which is ``sized``, grows; None: it does not. Errors: see Ramp."""
    train, context = config.train, config.model.context
    if not train.ramp_start:
        if train.ramp_increment or train.ramp_tokens:
            raise ConfigError("train.ramp_increment and train.ramp_tokens need train.ramp_start")
        return None
    if not TASKS[config.task.name].rows_are_alike:
        fit = " or ".join(name for name, task in TASKS.items() if task.rows_are_alike)
        raise ConfigError(f"train.ramp_start is for task.name={fit}, whose rows are alike; not for {config.task.name}")
    full = train.global_tokens // context if train.global_tokens else train.global_batch
    return Ramp(train.ramp_start, train.ramp_increment, train.ramp_tokens // context, full)


def feed_of(config: RunConfig, number: int, replicas: int, pin: bool = False) -> Feed:
    """How replica ``number`` of so many wants its batches. config: ``sized``.

    Errors: ConfigError where the tokens of an update are not whole rows, for a task whose rows are alike.
    """
    context, rows, tokens = config.model.context, config.train.global_batch, config.train.global_tokens
    if tokens and TASKS[config.task.name].rows_are_alike:
        if tokens % context:
            raise ConfigError(
                f"train.global_tokens={tokens} is not a multiple of model.context={context}; "
                f"set it to {max(1, tokens // context) * context}"
            )
        rows = tokens // context
    sharer = "rank" if config.mesh.ranks == 1 else "replica"
    sizes = config.train.microbatch, number, replicas, tokens, pin
    feed = Feed(context, config.seed, rows, *sizes, ramp_of(config), sharer)
    feed.check_ramp()
    return feed


def check_shareable(config: RunConfig, replicas: int) -> None:
    """Errors: ConfigError where so many replicas cannot share every batch of ``config`` (``sized``) evenly."""
    feed = feed_of(config, 0, replicas)
    if TASKS[config.task.name].rows_are_alike:  # the batches of other tasks are shared as evenly as can be
        _ = feed.share  # which raises it
