"""What a run will need of a rank's memory at its peak, from its settings alone.

What a microbatch takes is counted by a dry run (dry_run.py), weights and buffers are added up. What is not a tensor is
assumed, as it was measured: PROCESS_MIB and ALLOCATOR_SHARE. Against whole runs on two AMD cores, the language models
tried were within 5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from hvdtrain.comm.shared_axis import window_bytes
from hvdtrain.config import RunConfig
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.cut.schedules import SCHEDULES, Backward, Forward, Pass, WeightGradient
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.machine.matmul import has_fast_bf16
from hvdtrain.models.losses import chunk_rows
from hvdtrain.optim.muon import working_bytes
from hvdtrain.optim.optimizer import state_bytes
from hvdtrain.planner.dry_run import AttentionKind, Footprint, dry_stages
from hvdtrain.planner.shares import Share, balance, shares_of
from hvdtrain.planner.workload import Workload
from hvdtrain.sync import SYNCS, needs_of
from hvdtrain.sync.apart import ApartSync
from hvdtrain.sync.matrices import bytes_at_peak, is_narrow
from hvdtrain.sync.needs import Needs, Trained
from hvdtrain.tasks import make_task

# Of a process that has taken its first steps with a model of no size: Python, torch and its kernels, numpy, HDF5.
PROCESS_MIB = {
    "libraries": 296.0,
    "tensorboard": 12.0,
    "several ranks": 10.0,  # Horovod and MPI
    "compile": 192.0,  # torch's compiler
    "recompute": 84.0,  # the same, loaded by torch's checkpointing and not used
    "tensor axis": 8.0,  # operators of one's own
}
# What a CPU's step takes beyond its live tensors, as a share of activations and temporaries: holes between blocks that
# the C library keeps (machine/malloc.py), and what matrix libraries pack their factors into.
ALLOCATOR_SHARE = 0.3
# Where each batch has another shape, few holes fit again: 1.1 (pairs) and 1.8 (labels) after 24 steps, still growing.
ALLOCATOR_SHARE_OF_SHAPES = 1.4
GPU_WORKSPACE_MIB = 32.0  # cuBLAS's, of torch's own making

_MIB = 1 << 20
_OF_GPU = {"library workspace": int(GPU_WORKSPACE_MIB * _MIB)}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak: of its process on a CPU, of its tensors on a GPU.

    ``parts``: what they are, in the order in which one would explain them; together ``total``.
    ``of_layer``: what a Transformer block keeps for backward, on average over the blocks. ``sent``: bytes that it sends
    in a step, by axis of the mesh. ``balance``: mean cost of the ranks of a pipeline over that of the dearest.
    """

    device: str
    parts: dict[str, int]
    of_layer: int
    assumptions: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    balance: float = 1.0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(config: RunConfig, facts: CorpusFacts, load: Workload, device: str, math_attention: bool = False) -> Memory:
    """What a rank holds at its peak: the one that holds most. device: cpu or cuda.

    math_attention: attention as two batched products, which keep T x T scores; as a CPU does where flash attention is
    switched off (machine/matmul.py) and rows are not causal. With dropout a CPU has no other, whatever is said here.
    """
    attention: AttentionKind = "fused" if device == "cuda" else "math" if math_attention else "flash"
    shares = shares_of(config, facts)
    models = dict(sorted((number, model) for share in shares for number, model in share.stages.items()))
    stages = list(models.values())
    steps = dry_stages(stages, config, load.microbatch, load.positions, attention)
    evaluations = dry_stages(stages, config, config.eval.rows, load.positions, attention, training=False)
    if device == "cuda" and make_task(config.task).predicts_tokens:
        of_loss = steps[-1].before_loss + _chunk_on_gpu(config, facts, load)
        steps[-1] = replace(steps[-1], peak=max(steps[-1].peak, of_loss))
    passes = SCHEDULES[config.cut.schedule](len(shares), load.microbatches, config.cut.stages_per_rank)
    found = []
    for rank, share in enumerate(shares):
        evaluation = max(evaluations[number].peak for number in share.stages)
        kept, peak = alive(passes[rank], steps) if len(shares) > 1 else (steps[0].kept, steps[0].peak)
        trained = _trained(config, share, load)
        needs = needs_of(config.sync, trained)
        parts = _parts(config, share, trained, needs)
        at_most = max(
            peak, needs.passing, _orthogonal(config, share, needs.moved / max(1, trained.count), load, device)
        )
        parts |= {"activations": kept, "temporaries": at_most - kept}
        parts["evaluation"] = max(0, evaluation + needs.viewed - at_most)
        if len(shares) > 1:
            parts["transfers"] = 2 * sum(_handed(steps, number) for number in share.stages)
        if device == "cpu":
            parts |= _of_process(config, facts, parts, share.largest, load)
            parts["allocator"] = int(_allocator_share(config) * max(peak, evaluation))
        else:
            parts |= _OF_GPU
        of_layer = max(steps[number].of_layer for number in share.stages)
        sent = _sent(load, share, steps, needs)
        found.append(Memory(device, parts, of_layer, sent=sent))
        if needs.server is not None:
            of_server = _parts(config, share, trained, needs.server)
            found.append(_of_server(config, load, of_server, needs.server, device))
    most = max(found, key=lambda one: one.total)
    return replace(most, assumptions=_assumptions(config, load, device), balance=balance(shares))


def alive(passes: Sequence[Pass], steps: Sequence[Footprint]) -> tuple[int, int]:
    """Bytes that a rank keeps of the microbatches under way, and has at its peak. passes: its own, in order.
    steps: what one microbatch takes, by stage.
    """
    now = kept = peak = 0
    for step in passes:
        of_stage = steps[step.stage]
        if isinstance(step, Forward):
            peak = max(peak, now + of_stage.peak)
            now += of_stage.kept
            kept = max(kept, now)
        else:
            peak = max(peak, now - of_stage.kept + of_stage.peak)
            now -= of_stage.kept if isinstance(step, Backward | WeightGradient) else 0
    return kept, peak


def _parts(config: RunConfig, share: Share, trained: Trained, needs: Needs) -> dict[str, int]:
    """Weights, and what belongs to each of them."""
    precision = PRECISIONS[config.precision]
    return {
        "weights": 4 * share.count + share.buffer_bytes,
        "gradients": needs.gradients,
        "optimizer state": -(-trained.state_bytes * needs.moved // max(1, trained.count)),
        "16-bit weights": 2 * share.count if precision.weights else 0,
        "averaged weights": 4 * needs.moved if config.ema.decay > 0 else 0,
        "kept to agree": needs.kept,
        "wire buffers": needs.buffers,
    }


def _trained(config: RunConfig, share: Share, load: Workload) -> Trained:
    """What the way in which replicas agree has to know of this rank."""
    ranks = load.ranks // config.mesh.ranks
    return Trained(
        [tuple(parameter.shape) for parameter in share.parameters.values() if parameter.requires_grad],
        state_bytes(config.optim, share.trained, sum(share.matrices)),
        ranks,
        load.steps,
        load.microbatches,
        bool(PRECISIONS[config.precision].weights),
        {holders * ranks: count for holders, count in share.by_holders().items()},
    )


def _orthogonal(config: RunConfig, share: Share, moved: float, load: Workload, device: str) -> int:
    """What Muon takes to make matrices orthogonal. moved: of all numbers, by this rank."""
    options, sync, ranks = config.optim.muon, config.sync, load.replicas * config.mesh.tensor
    if config.optim.name != "muon":
        return 0
    narrow = is_narrow(options, has_fast_bf16(torch.device(device)))
    numbers = sum(share.matrices)
    working = working_bytes(numbers, max(share.matrices, default=0), device == "cpu", narrow)
    is_alike = config.mesh.tensor == 1 and moved == 1
    if ranks == 1 or issubclass(SYNCS[sync.name], ApartSync) or (is_alike and options.share == "never"):
        return working
    return working + bytes_at_peak(round(numbers * moved), ranks, is_alike, narrow)


def _of_server(config: RunConfig, load: Workload, parts: Mapping[str, int], needs: Needs, device: str) -> Memory:
    """Of a rank that takes no rows. parts: see ``_parts``."""
    parts = {**parts, "process": int(sum(_process_mib(config, load.ranks).values()) * _MIB)}
    return Memory(device, parts, 0, sent={"replica": round(needs.sent), "tensor": 0, "pipe": 0})


def _of_process(
    config: RunConfig, facts: CorpusFacts, parts: Mapping[str, int], largest: int, load: Workload
) -> dict[str, int]:
    """What a CPU's process has beside tensors of its step. parts: those that were told before; largest: see Share."""
    found = {"loader buffers": loader_bytes(config, facts, load), "mapped shards": facts.shard_bytes}
    if config.checkpoint.asynchronous:
        saved = parts["weights"] + parts["optimizer state"] + parts["averaged weights"]
        found["copy for saving"] = max(saved // load.replicas, 4 * largest)
    if (parts_of_axis := config.mesh.tensor) > 1:
        stream = 4 * load.microbatch * load.positions * config.model.width
        found["shared memory"] = parts_of_axis * window_bytes(stream)
    found["process"] = int(sum(_process_mib(config, load.ranks).values()) * _MIB)
    return found


def _allocator_share(config: RunConfig) -> float:
    return ALLOCATOR_SHARE if make_task(config.task).rows_are_alike else ALLOCATOR_SHARE_OF_SHAPES


def _assumptions(config: RunConfig, load: Workload, device: str) -> list[str]:
    said = []
    if device == "cuda":
        if config.model.positions == "relative":
            said.append("positions=relative: T x T scores are kept, which a GPU may spare")
        said.append(f"{GPU_WORKSPACE_MIB:.0f} MiB of cuBLAS workspace; what CUDA itself takes is not counted")
    else:
        process = _process_mib(config, load.ranks)
        said.append("process: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in process.items()))
        said.append(f"allocator: {_allocator_share(config):.0%} of what comes and goes in a step")
        said.append("mapped shards: all read at least once, and not yet taken back by the kernel")
    if config.compile != "none":
        said.append(f"compile={config.compile}: activations as without it, where they are often fewer")
    if make_task(config.task).rows_are_packed:
        said.append("packed rows: as if each row were one document")
    if config.mesh.ranks > 1:
        said.append("memory: of the rank of a replica that holds most")
    return said


def _handed(steps: Sequence[Footprint], number: int) -> int:
    """Bytes that a stage is given, and hands on, of a microbatch; their gradients are as many."""
    return (steps[number - 1].handed_on if number else 0) + steps[number].handed_on


def _sent(load: Workload, share: Share, steps: Sequence[Footprint], needs: Needs) -> dict[str, int]:
    """Bytes that a rank sends in a step, by axis: to other replicas, sums within layers, activations and their
    gradients to the stages behind and before.
    """
    return {
        "replica": round(needs.sent),
        "tensor": load.microbatches * sum(steps[number].summed for number in share.stages),
        "pipe": load.microbatches * sum(_handed(steps, number) for number in share.stages),
    }


def loader_bytes(config: RunConfig, facts: CorpusFacts, load: Workload) -> int:
    """What the loader's thread makes ahead, and the step that is handed out."""
    steps_per_epoch = facts.train_tokens // load.global_tokens if facts.train_tokens else None
    return make_task(config.task).loader_bytes(load.rows_of_rank, load.positions, steps_per_epoch, facts)


def _process_mib(config: RunConfig, ranks: int) -> dict[str, float]:
    takes = {
        "libraries": True,
        "tensorboard": config.metrics.tensorboard,
        "several ranks": ranks > 1,
        "compile": config.compile != "none",
        "recompute": config.recompute.name != "none" and config.compile == "none",
        "tensor axis": config.mesh.tensor > 1,
    }
    return {name: mib for name, mib in PROCESS_MIB.items() if takes[name]}


def _chunk_on_gpu(config: RunConfig, facts: CorpusFacts, load: Workload) -> int:
    """The logits that models/losses.py holds at once on a GPU, as the dry run is a CPU's. Their gradient comes in their
    place; with a vocabulary that is cut, it and the softmax stand beside them.

    And the gradients of hidden states and of the head's weight.
    """
    vocabulary = config.model.padded(facts.vocab_size)
    with torch.device("meta"):
        targets = make_task(config.task).example(load.microbatch, load.positions).target_tokens
    is_cut = config.mesh.tensor > 1
    rows = min(targets, chunk_rows("cuda", vocabulary, fused=not is_cut))
    narrow = 4 if config.precision == "fp32" else 2
    apart = 4 + (0 if narrow == 4 else narrow) if is_cut else 0
    logits = rows * vocabulary * (narrow + apart)
    return logits + narrow * targets * config.model.width + 2 * 4 * vocabulary * config.model.width
