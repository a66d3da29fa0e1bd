"""The time of a step before it is run: from what a plan says that a rank computes and sends, and a cluster's figures.

    compute     the passes of all microbatches by themselves: FLOPs over the rate at that microbatch
    tensor      sums within layers, over the tensor axis
    bubble      waiting for other stages of the pipeline, by the schedule's own instructions
    exchange    of gradients: what backward does not hide (replay.py)
    optimizer   reading and writing weights, gradients and its state
    save        for which checkpoints hold training up, a step's share
    growth      what every doubling of the nodes adds beyond that (growth.py)
    stragglers  waiting for the slowest rank

A pure function of two records; ``work_of`` makes the first from a plan.
"""

from dataclasses import dataclass, fields
from math import log2
from statistics import NormalDist

from hvdtrain.config import RunConfig
from hvdtrain.cut.checker import Costs, check
from hvdtrain.cut.schedules import SCHEDULES, with_transfers
from hvdtrain.optim.optimizer import state_bytes
from hvdtrain.planner.cluster import Cluster
from hvdtrain.planner.collectives import Link, Place, all_reduce
from hvdtrain.planner.estimate import Estimate
from hvdtrain.planner.replay import Bucket, exposed, ready_times
from hvdtrain.sync.needs import bytes_of_bucket

_HIDES = ("allreduce", "zero")  # what backward hides; other syncs begin when it is over
_MIB = 1 << 20
# A message over MPI that finds the other rank computing: until that one's thread of Horovod's answers the announcement,
# and this one's sends. Measured: 1.5 to 2 ms, where the thread looks every millisecond.
_LOOKS = 2


@dataclass(frozen=True)
class Work:
    """Of one rank in a step.

    flops: of its share of one microbatch, forward and backward; tokens: of a microbatch. recomputed: of forward, the
    share that is computed twice. stages: of the pipeline's ranks; balance: see Memory. tensor_bytes: sent over the
    tensor axis for a microbatch, in ``tensor_sums`` sums. handed_bytes: from one stage to the next, of a microbatch;
    looks: of Horovod's thread, for which such a message waits.
    gradient_bytes: to be summed, as they travel, in buckets of ``bucket_bytes``; hides: does backward hide them?
    touched_bytes: by the optimizer. saved_bytes: of the whole checkpoint; save_every: steps between two, 0: none.
    """

    flops: float
    tokens: int
    microbatches: int
    ranks: int
    ranks_per_node: int
    replicas: int
    stages: int = 1
    stages_per_rank: int = 1
    schedule: str = "1f1b"
    balance: float = 1.0
    recomputed: float = 0.0
    tensor: int = 1
    tensor_bytes: float = 0.0
    tensor_sums: int = 0
    handed_bytes: float = 0.0
    looks: int = 0
    gradient_bytes: float = 0.0
    bucket_bytes: float = 16 * _MIB
    hides: bool = True
    touched_bytes: float = 0.0
    saved_bytes: float = 0.0
    save_every: int = 0
    asynchronous: bool = False

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they are spent on."""

    compute: float
    tensor: float
    bubble: float
    exchange: float
    optimizer: float
    save: float
    growth: float
    stragglers: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def step_time(work: Work, cluster: Cluster) -> StepTime:
    # What a pass takes however little there is to multiply is not divided among the parts of a tensor cut.
    computing = work.flops / cluster.flops_per_s(work.tokens / work.tensor)
    forward = computing / 3
    again = forward * work.recomputed
    sums = _tensor_sums(work, cluster)
    passes = forward + sums / 2, 2 * forward + again + sums / 2  # forward, backward, of a microbatch
    makespan = _pipeline(work, passes, cluster)
    compute, tensor = (forward * 3 + again) * work.microbatches, sums * work.microbatches
    exchange = _exchange(work, cluster, passes[1])
    optimizer = work.touched_bytes / (cluster["memory_gb_per_s"] * 1e9)
    growth = cluster["growth_s"] * log2(work.nodes)
    own = makespan + optimizer
    return StepTime(
        compute,
        tensor,
        makespan - compute - tensor,
        exchange,
        optimizer,
        hold_up(work, cluster) / work.save_every if work.save_every else 0.0,
        growth,
        own * (slowest(cluster["jitter"], work.ranks) - 1),
    )


def hold_up(work: Work, cluster: Cluster) -> float:
    """Seconds for which one checkpoint holds training up: until it is written, or, asynchronous, copied."""
    if work.asynchronous:
        return 2 * work.saved_bytes / work.ranks / (cluster["memory_gb_per_s"] * 1e9)
    return write_seconds(work, cluster)


def write_seconds(work: Work, cluster: Cluster) -> float:
    """Until a checkpoint is safe."""
    return work.saved_bytes / (cluster["save_gb_per_s"] * 1e9)


def slowest(jitter: float, ranks: int) -> float:
    """Of so many ranks, the slowest one's time over the mean: the expected maximum of normal numbers (Blom 1958)."""
    if ranks == 1:
        return 1.0
    return 1 + jitter * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


def _tensor_sums(work: Work, cluster: Cluster) -> float:
    """Seconds of a microbatch, forward and backward."""
    if work.tensor == 1:
        return 0.0
    link = _link(work, cluster, work.tensor)
    turns = 2 * (work.tensor - 1)
    return work.tensor_bytes / link.bytes_per_s + work.tensor_sums * turns * link.latency_s


def _pipeline(work: Work, passes: tuple[float, float], cluster: Cluster) -> float:
    """Seconds of all passes of a step, where the dearest stage takes what ``passes`` say."""
    if work.stages == 1:
        return sum(passes) * work.microbatches
    chunks = work.stages * work.stages_per_rank
    link = _link(work, cluster, work.tensor * work.stages)
    schedule = SCHEDULES[work.schedule](work.stages, work.microbatches, work.stages_per_rank)
    # A stage is one of the rank's; the mean rank has ``flops``, the dearest more.
    forward, backward = (each / work.stages_per_rank / work.balance for each in passes)
    transfer = work.looks * cluster["operation_us"] * 1e-6 + link.seconds(work.handed_bytes)
    costs = Costs([forward] * chunks, [backward] * chunks, transfer=transfer)
    return check(with_transfers(schedule), costs).makespan


def _link(work: Work, cluster: Cluster, neighbours: int) -> Link:
    """Between ranks of so many that follow one another; on several nodes all ranks of a node send at once."""
    if neighbours <= work.ranks_per_node and work.ranks_per_node % neighbours == 0:
        return cluster.inside
    out = cluster.between
    return Link(out.latency_s, out.bytes_per_s / work.ranks_per_node)


def _exchange(work: Work, cluster: Cluster, backward_s: float) -> float:
    """Seconds that the sums of gradients take longer than the last backward."""
    if work.replicas == 1 or not work.gradient_bytes:
        return 0.0
    place = place_of(work, cluster)
    count = max(1, round(work.gradient_bytes / work.bucket_bytes))
    size = work.gradient_bytes / count
    seconds = cluster["operation_us"] * 1e-6 + all_reduce(size, place)
    if not work.hides:
        return seconds * count
    ready = ready_times([size] * count, backward_s)
    return exposed([Bucket(at, seconds) for at in ready], backward_s)


def place_of(work: Work, cluster: Cluster) -> Place:
    """Of the ranks that hold the same part of each replica."""
    of_replica = work.ranks // work.replicas
    per_node = max(1, work.ranks_per_node // of_replica)
    nodes = -(-work.replicas // per_node)
    sharing = min(of_replica, work.ranks_per_node)
    return Place(nodes, min(per_node, work.replicas), cluster.inside, cluster.between, sharing)


# --- from a plan ---------------------------------------------------------------------------------------------------


def work_of(found: Estimate) -> Work:
    """What a plan says of a rank's step."""
    config, load, sent = found.config, found.load, found.memory.sent
    shards = load.replicas if config.sync.name == "zero" else 1
    state = state_bytes(config.optim, load.trained, load.matrices)
    touched = (4 * 2 + 4) * load.trained + 2 * state  # weight and state are read and written, gradient is read
    return Work(
        flops=load.flops_of_step / load.microbatches,
        tokens=load.microbatch * load.positions,
        microbatches=load.microbatches,
        ranks=load.ranks,
        ranks_per_node=load.ranks_per_node,
        replicas=load.replicas,
        stages=config.mesh.pipeline,
        stages_per_rank=config.cut.stages_per_rank,
        schedule=config.cut.schedule,
        balance=found.memory.balance,
        recomputed=1 / config.recompute.every if config.recompute.name == "full" else 0.0,
        tensor=config.mesh.tensor,
        tensor_bytes=sent.get("tensor", 0) / load.microbatches,
        tensor_sums=_sums_of(config),
        handed_bytes=sent.get("pipe", 0) / load.microbatches / _transfers(config),
        looks=_LOOKS if found.memory.device == "cpu" else 0,
        gradient_bytes=_summed_bytes(sent.get("replica", 0), load.replicas),
        bucket_bytes=bytes_of_bucket(_bucket_mib(config), 4 * load.trained // config.mesh.ranks),
        hides=config.sync.name in _HIDES and not (config.mesh.ranks > 1 and found.memory.device == "cuda"),
        touched_bytes=touched / config.mesh.ranks / shards,
        saved_bytes=4 * load.parameters + state,
        save_every=config.checkpoint.every,
        asynchronous=config.checkpoint.asynchronous,
    )


def _bucket_mib(config: RunConfig) -> float:
    """Of the way in which replicas agree."""
    sync = config.sync
    others = {"zero": sync.zero.bucket_mib, "parameter_server": sync.parameter_server.bucket_mib}
    return others.get(sync.name, sync.allreduce.bucket_mib)


def _summed_bytes(sent: float, replicas: int) -> float:
    """Of the tensor whose ring all-reduce sends so much."""
    return sent * replicas / (2 * (replicas - 1)) if replicas > 1 else 0.0


def _transfers(config: RunConfig) -> int:
    """Of a microbatch, by the rank that sends most: of activations and of gradients."""
    inner = config.mesh.pipeline > 2 or config.cut.stages_per_rank > 1
    return (2 if inner else 1) * config.cut.stages_per_rank


def _sums_of(config: RunConfig) -> int:
    """Of a microbatch: a block sums twice forward and twice backward, embedding and head once; with the sequence split,
    each is a gather and a scatter.
    """
    return (4 * config.model.layers + 2) // max(1, config.mesh.pipeline)
