"""What a run will need of a rank's memory at its peak, from its settings alone.

What a microbatch takes is counted by a dry run (dry_run.py), weights and buffers are added up. What is not a tensor is
assumed, as it was measured: PROCESS_MIB and ALLOCATOR_SHARE. Against whole runs on two AMD cores, the language models
tried were within 5 %.
"""

from dataclasses import dataclass, field

import torch

from hvdtrain.config import RunConfig
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.models.losses import chunk_rows
from hvdtrain.optim.optimizer import state_bytes
from hvdtrain.planner.dry_run import AttentionKind, dry_run
from hvdtrain.planner.workload import Workload, build_model
from hvdtrain.sync.allreduce import AllReduceOptions
from hvdtrain.sync.wire import FORMS
from hvdtrain.tasks import make_task

# Of a process that has taken its first steps with a model of no size: Python, torch and its kernels, numpy, HDF5.
PROCESS_MIB = {
    "libraries": 345.0,
    "tensorboard": 12.0,
    "several ranks": 10.0,  # Horovod and MPI
    "compile": 120.0,  # torch's compiler
}
# What a CPU's step takes beyond its live tensors, as a share of activations and temporaries: holes between blocks that
# the C library keeps (machine/malloc.py), and what matrix libraries pack their factors into.
ALLOCATOR_SHARE = 0.3
# Where each batch has another shape, few holes fit again: 1.1 (pairs) and 1.8 (labels) after 24 steps, still growing.
ALLOCATOR_SHARE_OF_SHAPES = 1.4
GPU_WORKSPACE_MIB = 32.0  # cuBLAS's, of torch's own making

_MIB = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak: of its process on a CPU, of its tensors on a GPU.

    ``parts``: what they are, in the order in which one would explain them; together ``total``.
    ``of_layer``: what a Transformer block keeps for backward, on average over the blocks.
    """

    device: str
    parts: dict[str, int]
    of_layer: int
    assumptions: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(config: RunConfig, facts: CorpusFacts, load: Workload, device: str, math_attention: bool = False) -> Memory:
    """What one rank holds at its peak. device: cpu or cuda.

    math_attention: attention as two batched products, which keep T x T scores; as a CPU does where flash attention is
    switched off (machine/matmul.py). With dropout a CPU has no other, whatever is said here.
    """
    with torch.device("meta"):
        model = build_model(config, facts)
    task, count, trained, precision = (
        make_task(config.task),
        load.parameters,
        load.trained,
        PRECISIONS[config.precision],
    )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    largest = max(p.numel() for p in model.parameters() if p.requires_grad)
    attention: AttentionKind = "fused" if device == "cuda" else "math" if math_attention else "flash"
    step = dry_run(config, facts, load.microbatch, load.positions, attention)
    peak = step.peak
    if device == "cuda" and task.predicts_tokens:
        peak = max(peak, step.before_loss + _chunk_on_gpu(config, facts, load))
    evaluation = dry_run(config, facts, config.eval.rows, load.positions, attention, training=False).peak
    parts = {
        "weights": 4 * count + buffers,
        "gradients": 4 * trained,
        "optimizer state": state_bytes(config.optim) * trained,
        "16-bit weights": 2 * count if precision.weights else 0,
        "averaged weights": 4 * trained if config.ema.decay > 0 else 0,
        "wire buffers": wire_bytes(trained, largest, load.ranks, config.sync.allreduce),
        "activations": step.kept,
        "temporaries": peak - step.kept,
        "evaluation": max(0, evaluation - peak),
    }
    assumptions = []
    if device == "cuda":
        parts["library workspace"] = int(GPU_WORKSPACE_MIB * _MIB)
        if config.model.positions == "relative":
            assumptions.append("positions=relative: T x T scores are kept, which a GPU may spare")
        assumptions.append(f"{GPU_WORKSPACE_MIB:.0f} MiB of cuBLAS workspace; what CUDA itself takes is not counted")
    else:
        process = _process_mib(config, load.ranks)
        parts["loader buffers"] = loader_bytes(config, facts, load)
        parts["mapped shards"] = facts.shard_bytes
        if config.checkpoint.asynchronous:
            saved = 4 * count + parts["optimizer state"] + parts["averaged weights"]
            parts["copy for saving"] = max(saved // load.ranks, 4 * largest)
        share = ALLOCATOR_SHARE if task.rows_are_alike else ALLOCATOR_SHARE_OF_SHAPES
        parts["allocator"] = int(share * max(peak, evaluation))
        parts["process"] = int(sum(process.values()) * _MIB)
        assumptions.append("process: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in process.items()))
        assumptions.append(f"allocator: {share:.0%} of what comes and goes in a step")
        assumptions.append("mapped shards: all read at least once, and not yet taken back by the kernel")
    if config.compile != "none":
        assumptions.append(f"compile={config.compile}: activations as without it, where they are often fewer")
    if task.rows_are_packed:
        assumptions.append("packed rows: as if each row were one document")
    return Memory(device, parts, step.of_layer, assumptions)


def wire_bytes(parameters: int, largest: int, ranks: int, options: AllReduceOptions) -> int:
    """Buffers of a two-byte wire (sync/wire.py): two numbers of 2 bytes for each parameter, and room for the
    ranks' fp32 numbers of the largest bucket's part and their sum. ``largest``: parameters in the largest tensor.
    """
    form = FORMS[options.wire]
    if ranks == 1 or form is None:
        return 0
    bucket = min(parameters, max(largest, int(options.bucket_mib * _MIB) // 4))
    return 2 * form.dtype.itemsize * parameters + 4 * (ranks + 1) * -(-bucket // ranks)


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
    }
    return {name: mib for name, mib in PROCESS_MIB.items() if takes[name]}


def _chunk_on_gpu(config: RunConfig, facts: CorpusFacts, load: Workload) -> int:
    """The logits that models/losses.py holds at once on a GPU, with their softmax and gradient; the dry run is a CPU's.

    And the gradients of hidden states and of the head's weight.
    """
    vocabulary = config.model.padded(facts.vocab_size)
    with torch.device("meta"):
        targets = make_task(config.task).example(load.microbatch, load.positions).target_tokens
    rows = min(targets, chunk_rows("cuda", vocabulary))
    narrow = 4 if config.precision == "fp32" else 2
    logits = rows * vocabulary * (narrow + 4 + (0 if narrow == 4 else narrow))
    return logits + narrow * targets * config.model.width + 2 * 4 * vocabulary * config.model.width
