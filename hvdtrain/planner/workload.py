"""What a step and a whole run are for a rank, from the recipe and what is known of the data; no weight is allocated."""

from dataclasses import asdict, dataclass
from typing import Any

from hvdtrain.config import RunConfig
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.data.shards import Manifest, token_dtype
from hvdtrain.errors import ConfigError
from hvdtrain.models.frozen import freeze
from hvdtrain.models.lora import adapt
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.pieces import Staged
from hvdtrain.models.recompute import use_recompute
from hvdtrain.models.weightless import weightless
from hvdtrain.sizing import feed_of
from hvdtrain.tasks import TASKS, make_task


@dataclass(frozen=True)
class Workload:
    """A step and a run, as the ranks share them.

    Where rows have lengths of their own (seq2seq, classify, packed) this is the largest step: rows of ``positions``
    tokens, and ``tokens`` is what the run sees at most.
    """

    ranks: int
    nodes: int
    ranks_per_node: int  # on the fullest node
    global_batch: int  # sequences
    global_tokens: int
    replicas: int
    rows_of_rank: int  # sequences, of its replica
    microbatch: int  # sequences of a forward pass
    microbatches: int  # forward passes of a step
    positions: int  # tokens of a row
    lr: float
    min_lr: float
    warmup_steps: int
    steps: int
    tokens: int  # of the whole run
    epochs: float | None  # of the training tokens; None: not known
    parameters: int
    trained: int  # of them; others are frozen
    matrices: int  # of those that are trained, in matrices of blocks
    flops_of_step: int  # model FLOPs of a rank, forward and backward, on average over the ranks of a replica


@dataclass(frozen=True)
class StepRows:
    """Of ``Workload``: how a step's rows are shared, for which no model need be known."""

    global_batch: int
    global_tokens: int
    replicas: int
    rows_of_rank: int
    microbatch: int
    microbatches: int
    positions: int


def step_rows(config: RunConfig, ranks: int, longest: int = 0) -> StepRows:
    """longest: see CorpusFacts. Errors: ConfigError where the ranks cannot share the batch."""
    replicas = config.replicas_of(ranks)
    feed = feed_of(config, 0, replicas)
    if TASKS[config.task.name].rows_are_alike:
        positions, rows = feed.context, feed.global_batch
        mine, microbatch = feed.share.count, feed.share.microbatch
        global_tokens = rows * positions
    else:
        positions = min(longest or feed.context, feed.context)
        global_tokens = feed.global_tokens or feed.global_batch * feed.context
        rows = max(1, global_tokens // positions)
        mine = -(-rows // replicas)
        microbatch = min(feed.microbatch or mine, mine)
    return StepRows(rows, global_tokens, replicas, mine, microbatch, -(-mine // microbatch), positions)


def workload(config: RunConfig, facts: CorpusFacts, ranks: int, ranks_per_node: int = 0) -> Workload:
    """What each of ``ranks`` does in a step. ``ranks_per_node``: 0: all on one node.

    Errors: ConfigError where the ranks cannot share the batch, or numbers of ranks are not above 0.
    """
    check_ranks(ranks, ranks_per_node)
    task, of_rank = make_task(config.task), step_rows(config, ranks, facts.longest)
    with weightless():
        model, batch = build_model(config, facts), task.example(of_rank.microbatch, of_rank.positions)
    parameters = sum(p.numel() for p in model.parameters())
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    tokens = config.train.steps * of_rank.global_tokens
    return Workload(
        ranks=ranks,
        nodes=-(-ranks // (ranks_per_node or ranks)),
        ranks_per_node=min(ranks, ranks_per_node or ranks),
        **asdict(of_rank),
        lr=config.optim.lr,
        min_lr=config.schedule.min_lr,
        warmup_steps=config.schedule.warmup_steps,
        steps=config.train.steps,
        tokens=tokens,
        epochs=tokens / facts.train_tokens if facts.train_tokens else None,
        parameters=parameters,
        trained=sum(trained.values()),
        matrices=sum(trained[name] for name in block_matrices(trained, config.model)),
        flops_of_step=of_rank.microbatches * task.training_flops(model, batch) // config.mesh.ranks,
    )


def check_ranks(ranks: int, ranks_per_node: int) -> None:
    """Errors: ConfigError for numbers that no job has."""
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: a job has 1 rank or more")
    if ranks_per_node < 0:
        raise ConfigError(f"--ranks-per-node {ranks_per_node}: give 1 or more, or leave it out for one node")


def build_model(config: RunConfig, facts: CorpusFacts) -> Staged:
    """The run's model, not initialised, on torch's present device."""
    labels = tuple(map(str, range(facts.classes)))
    dtype: Any = str(token_dtype(facts.vocab_size))
    manifest = Manifest(facts.vocab_size, "", dtype, (), {}, label_names=labels)
    task = make_task(config.task)
    model: Staged = task.make_model(config.model, manifest)
    adapt(model, config.model, config.model.lora)
    freeze(model, config.optim.freeze, config.model.lora, task.predicts_tokens)
    use_recompute(model, config.recompute)
    return model
