"""What a run will need of a rank, from its settings alone: batch, FLOPs, bytes on the wire, memory.

No weight is allocated. One microbatch goes forward and backward over tensors that have shapes and no numbers (torch's
FakeTensorMode), and the bytes of every storage are counted for as long as it would live. So what autograd keeps is not
in a table here: it follows from the model's own code, with every option, and from torch's choice of attention.

    bytes alive   |             ___
                  |          __/   \\__             peak      activations and temporaries
                  |       __/         \\__          kept      activations: what backward waits for
                  |    __/               \\__
                  | __/                     \\__
                  +-------------------------------
                     forward  loss  backward

What is not a tensor is assumed, as it was measured: PROCESS_MIB and ALLOCATOR_SHARE.
Against whole runs on two AMD cores, the language models tried were within 5 %.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvdtrain.config import RunConfig
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.batch import AnyBatch, Batch, LabelBatch, PairBatch
from hvdtrain.data.loader import BUFFERS
from hvdtrain.data.sampler import share_of
from hvdtrain.data.shards import Manifest, token_dtype
from hvdtrain.errors import ConfigError
from hvdtrain.models.layers import Attention, CrossAttention
from hvdtrain.models.recompute import Recomputed, use_recompute
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.sizing import feed_of
from hvdtrain.sync.allreduce import AllReduceOptions
from hvdtrain.tasks import make_task

# Of a process that has taken its first steps with a model of no size: Python, torch and its kernels, numpy, HDF5.
PROCESS_MIB = {
    "libraries": 345.0,
    "tensorboard": 12.0,
    "several ranks": 10.0,  # Horovod and MPI
    "compile": 120.0,  # torch's compiler
}
# What a CPU's step takes beyond its live tensors, as a share of activations and temporaries: holes between blocks that
# the C library keeps (malloc.py), and what matrix libraries pack their factors into.
ALLOCATOR_SHARE = 0.3
# Where each batch has another shape, few holes fit again: 1.1 (pairs) and 1.8 (labels) after 24 steps, still growing.
ALLOCATOR_SHARE_OF_SHAPES = 1.4
GPU_WORKSPACE_MIB = 32.0  # cuBLAS's, of torch's own making

# Bytes of state that an optimizer keeps for each parameter.
STATE_BYTES = {"adamw": 8, "lamb": 8, "lars": 4, "sgd": 4}

_BLOCK_TOKENS = 1 << 20  # that the loader gathers at once: data/windows.py
_CHUNK_ELEMENTS_GPU, _MIN_ROWS = 1 << 26, 256  # of the loss: models/losses.py
_MIB = 1 << 20


@dataclass(frozen=True)
class CorpusFacts:
    """What the data say of a run's size. 0: not known, and left out of the estimate.

    ``longest``: tokens of the longest row that is trained on, where rows have lengths of their own; 0: the context.
    ``shard_bytes``: of all shards; ``documents``: those of pairs or labels.
    """

    vocab_size: int
    classes: int = 2
    longest: int = 0
    train_tokens: int = 0
    shard_bytes: int = 0
    documents: int = 0


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
    rows_of_rank: int  # sequences
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
    flops_of_step: int  # model FLOPs of a rank, forward and backward
    sent_bytes: int  # by a rank in a step


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


# --- a step and a run ---------------------------------------------------------------------------------------------


def workload(config: RunConfig, facts: CorpusFacts, ranks: int, ranks_per_node: int = 0) -> Workload:
    """What each of ``ranks`` does in a step. ``ranks_per_node``: 0: all on one node.

    Errors: ConfigError where the ranks cannot share the batch, or numbers of ranks are not above 0.
    """
    check_ranks(ranks, ranks_per_node)
    feed = feed_of(config, 0, ranks)
    if config.task.name == "lm":
        positions = feed.context
        share = share_of(feed.global_batch, feed.microbatch, 0, ranks)
        rows, mine, microbatch = feed.global_batch, share.count, share.microbatch
        global_tokens = rows * positions
    else:
        positions = min(facts.longest or feed.context, feed.context)
        global_tokens = feed.global_tokens or feed.global_batch * feed.context
        rows = max(1, global_tokens // positions)
        mine = -(-rows // ranks)
        microbatch = min(feed.microbatch or mine, mine)
    microbatches = -(-mine // microbatch)
    with torch.device("meta"):
        model, batch = build_model(config, facts), _batch(config.task.name, microbatch, positions)
    tokens = config.train.steps * global_tokens
    return Workload(
        ranks=ranks,
        nodes=-(-ranks // (ranks_per_node or ranks)),
        ranks_per_node=min(ranks, ranks_per_node or ranks),
        global_batch=rows,
        global_tokens=global_tokens,
        rows_of_rank=mine,
        microbatch=microbatch,
        microbatches=microbatches,
        positions=positions,
        lr=config.optim.lr,
        min_lr=config.schedule.min_lr,
        warmup_steps=config.schedule.warmup_steps,
        steps=config.train.steps,
        tokens=tokens,
        epochs=tokens / facts.train_tokens if facts.train_tokens else None,
        parameters=(count := _count(model)),
        flops_of_step=microbatches * make_task(config.task).training_flops(model, batch),
        sent_bytes=sent_bytes(count, ranks, config.sync.allreduce),
    )


def check_ranks(ranks: int, ranks_per_node: int) -> None:
    """Errors: ConfigError for numbers that no job has."""
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: a job has 1 rank or more")
    if ranks_per_node < 0:
        raise ConfigError(f"--ranks-per-node {ranks_per_node}: give 1 or more, or leave it out for one node")


def sent_bytes(parameters: int, ranks: int, options: AllReduceOptions) -> int:
    """By one rank in one step: a ring all-reduce of n bytes sends 2 (ranks - 1) / ranks * n of them, and so do the
    all-to-all and the all-gather of a two-byte wire together.
    """
    return 2 * (ranks - 1) * parameters * (4 if options.wire == "fp32" else 2) // ranks


def build_model(config: RunConfig, facts: CorpusFacts) -> nn.Module:
    """The run's model, not initialised, on torch's present device."""
    labels = tuple(map(str, range(facts.classes)))
    dtype = str(token_dtype(facts.vocab_size))
    manifest = Manifest(facts.vocab_size, "", dtype, (), {}, label_names=labels)
    model = make_task(config.task).make_model(config.model, manifest)
    use_recompute(model, config.recompute)
    return model


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# --- memory -------------------------------------------------------------------------------------------------------


def memory(config: RunConfig, facts: CorpusFacts, load: Workload, device: str, math_attention: bool = False) -> Memory:
    """What one rank holds at its peak. device: cpu or cuda.

    math_attention: attention as two batched products, which keep T x T scores; as a CPU does where flash attention is
    switched off (models/cpu.py). With dropout a CPU has no other, whatever is said here.
    """
    with torch.device("meta"):
        model = build_model(config, facts)
    count, precision = load.parameters, PRECISIONS[config.precision]
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    largest = max(p.numel() for p in model.parameters())
    attention = "fused" if device == "cuda" else "math" if math_attention else "flash"
    step = dry_run(config, facts, load.microbatch, load.positions, attention)
    peak = step.peak
    if device == "cuda":
        peak = max(peak, step.before_loss + _chunk_on_gpu(config, facts, load))
    evaluation = dry_run(config, facts, config.eval.rows, load.positions, attention, training=False).peak
    parts = {
        "weights": 4 * count + buffers,
        "gradients": 4 * count,
        "optimizer state": state_bytes(config.optim) * count,
        "16-bit weights": 2 * count if precision.weights else 0,
        "averaged weights": 4 * count if config.ema.decay > 0 else 0,
        "wire buffers": wire_bytes(count, largest, load.ranks, config.sync.allreduce),
        "activations": step.kept,
        "temporaries": peak - step.kept,
        "evaluation": max(0, evaluation - peak),
    }
    assumptions = []
    if device == "cuda":
        parts["library workspace"] = int(GPU_WORKSPACE_MIB * _MIB)
        assumptions.append(f"{GPU_WORKSPACE_MIB:.0f} MiB of cuBLAS workspace; what CUDA itself takes is not counted")
    else:
        process = _process_mib(config, load.ranks)
        parts["loader buffers"] = loader_bytes(config, facts, load)
        parts["mapped shards"] = facts.shard_bytes
        if config.checkpoint.asynchronous:
            saved = 4 * count + parts["optimizer state"] + parts["averaged weights"]
            parts["copy for saving"] = max(saved // load.ranks, 4 * largest)
        share = ALLOCATOR_SHARE if config.task.name == "lm" else ALLOCATOR_SHARE_OF_SHAPES
        parts["allocator"] = int(share * max(peak, evaluation))
        parts["process"] = int(sum(process.values()) * _MIB)
        assumptions.append("process: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in process.items()))
        assumptions.append(f"allocator: {share:.0%} of what comes and goes in a step")
        assumptions.append("mapped shards: all read at least once, and not yet taken back by the kernel")
    if config.compile != "none":
        assumptions.append(f"compile={config.compile}: activations as without it, where they are often fewer")
    if config.task.name == "lm" and config.task.lm.rows == "packed":
        assumptions.append("packed rows: as if each row were one document")
    return Memory(device, parts, step.of_layer, assumptions)


def state_bytes(options: OptimOptions) -> int:
    """Of an optimizer, for each parameter."""
    has_none = options.name in ("lars", "sgd") and not options.momentum
    return 0 if has_none else STATE_BYTES[options.name]


def wire_bytes(parameters: int, largest: int, ranks: int, options: AllReduceOptions) -> int:
    """Buffers of a two-byte wire (sync/wire.py): two numbers of 2 bytes for each parameter, and room for the
    ranks' fp32 numbers of the largest bucket's part and their sum. ``largest``: parameters in the largest tensor.
    """
    if ranks == 1 or options.wire == "fp32":
        return 0
    bucket = min(parameters, max(largest, int(options.bucket_mib * _MIB) // 4))
    return 4 * parameters + 4 * (ranks + 1) * -(-bucket // ranks)


def loader_bytes(config: RunConfig, facts: CorpusFacts, load: Workload) -> int:
    """What the loader's thread makes ahead, and the step that is handed out (data/windows.py and its neighbours)."""
    tokens_of_step = load.rows_of_rank * load.positions
    if config.task.name == "lm" and config.task.lm.rows == "windows":
        step = load.rows_of_rank * (load.positions + 1)
        steps = _BLOCK_TOKENS // step
        if facts.train_tokens:
            steps = min(steps, facts.train_tokens // load.global_tokens)
        return step * (BUFFERS * max(1, steps) * token_dtype(facts.vocab_size).itemsize + 8)
    tensors = {"lm": 4, "seq2seq": 3, "classify": 1}[config.task.name]  # int64, of about a step's tokens each
    index = facts.documents * {"lm": 16, "seq2seq": 20, "classify": 12}[config.task.name]  # lengths and their order
    return BUFFERS * tensors * 8 * tokens_of_step + index


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
    if config.task.name == "classify":
        return 0
    multiple = config.model.vocab_multiple
    vocabulary = -(-facts.vocab_size // multiple) * multiple
    targets = load.microbatch * load.positions
    rows = min(targets, max(_MIN_ROWS, _CHUNK_ELEMENTS_GPU // vocabulary))
    narrow = 4 if config.precision == "fp32" else 2
    logits = rows * vocabulary * (narrow + 4 + (0 if narrow == 4 else narrow))
    return logits + narrow * targets * config.model.width + 2 * 4 * vocabulary * config.model.width


# --- the dry run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Bytes of a microbatch beyond weights, their gradients and the batch itself.

    ``before_loss``: when the model has its output; ``kept``: when backward begins; ``of_layer``: of ``kept``, by a
    block on average; ``peak``: at any time.
    """

    before_loss: int
    kept: int
    of_layer: int
    peak: int


def dry_run(
    config: RunConfig,
    facts: CorpusFacts,
    rows: int,
    positions: int,
    attention: Literal["flash", "math", "fused"] = "flash",
    training: bool = True,
    shapes_only: bool = True,
) -> Footprint:
    """One microbatch forward and backward, or one batch of an evaluation, counting bytes as on a CPU.

    attention: math keeps T x T scores; flash does not, but on a CPU it knows no dropout and leaves that to math; fused
    is a GPU's, which does.
    shapes_only: with tensors that have no numbers; False: with real ones (for tests).
    """
    precision = PRECISIONS[config.precision]
    backends = [SDPBackend.MATH] if attention == "math" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with FakeTensorMode() if shapes_only else contextlib.nullcontext(), sdpa_kernel(backends):
        model = build_model(config, facts).train(training)
        if attention == "fused":
            for module in model.modules():
                if isinstance(module, Attention | CrossAttention):
                    module.dropout = 0.0
        if precision.weights:
            _convert(model, precision.weights)
        _give_gradients(model, dropped=bool(precision.weights))
        task, batch = make_task(config.task), _batch(config.task.name, rows, positions)
        live = LiveBytes(_tensors_of(model, batch))
        autocast = contextlib.nullcontext()
        if precision.autocast:
            autocast = torch.autocast("cpu", dtype=precision.autocast)
        with live, _noting(model, live) as notes:
            if training:
                with autocast:
                    loss = task.loss(model, batch)
                kept = live.now
                loss.total.backward()
            else:
                kept = 0
                with autocast, torch.no_grad():
                    if isinstance(batch, LabelBatch):  # scores ask which rows count, and shapes do not tell
                        model(batch.tokens, batch.lengths)
                    else:
                        task.measure(model, batch)
        of_layer = round(sum(notes.of_layers) / len(notes.of_layers))
        return Footprint(notes.before_loss, kept, of_layer, live.peak)


class LiveBytes(TorchDispatchMode):
    """While it is entered: how many bytes the storages have that operations made (``now``), and had at most (``peak``).

    Storages of ``known`` tensors count nothing.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._alive: dict[int, Any] = {id(storage): storage for storage in self._known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # a number asked of a tensor that has none; memory does not depend on it
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            self._watch(tensor.untyped_storage())
        within = 0
        if func is torch.ops.aten._safe_softmax.default:  # softmax, then the same with rows of nothing set to 0
            within = tensors[0].nbytes + tensors[0].numel()
        self.peak = max(self.peak, self.now + within)
        return made

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._alive:
            size = storage.nbytes()
            self._alive[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage), size))
            self.now += size

    def _forget(self, number: int, size: int, _: Any) -> None:
        del self._alive[number]
        self.now -= size


@dataclass
class _Notes:
    of_layers: list[int] = field(default_factory=list)
    before_loss: int = 0


@contextlib.contextmanager
def _noting(model: nn.Module, live: LiveBytes) -> Iterator[_Notes]:
    """Within: what each block of the model adds to the bytes alive, and how many there are when the model is done."""
    notes, before = _Notes(), []

    def enter(*_: Any) -> None:
        before.append(live.now)

    def leave(*_: Any) -> None:
        notes.of_layers.append(live.now - before.pop())

    def done(*_: Any) -> None:
        notes.before_loss = live.now

    hooks = [model.register_forward_hook(done)]
    for module in model.modules():
        if isinstance(module, Recomputed):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield notes
    finally:
        for hook in hooks:
            hook.remove()


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """``model.to(dtype)``, which shares nothing of tied weights where tensors are fake."""
    converted: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in list(model.parameters()):
        converted[parameter] = nn.Parameter(parameter.detach().to(dtype))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = converted[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def _give_gradients(model: nn.Module, dropped: bool) -> None:
    """As sync/allreduce.py has them: there before backward; of 16-bit weights added up elsewhere, and dropped."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if dropped:
            parameter.register_post_accumulate_grad_hook(drop)
        else:
            parameter.grad = torch.zeros_like(parameter)


def _batch(task: str, rows: int, positions: int) -> AnyBatch:
    tokens = torch.zeros(rows, positions, dtype=torch.int64)
    targets, lengths = torch.zeros_like(tokens), torch.full((rows,), positions)
    if task == "lm":
        return Batch(tokens, targets, rows * positions)
    if task == "seq2seq":
        return PairBatch(tokens, lengths, torch.zeros_like(tokens), targets, rows * positions)
    return LabelBatch(tokens, lengths, torch.zeros(rows, dtype=torch.int64), rows)


def _tensors_of(model: nn.Module, batch: AnyBatch) -> list[torch.Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    of_batch = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *gradients, *of_batch]
