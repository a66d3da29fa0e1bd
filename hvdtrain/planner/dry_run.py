"""The bytes that a microbatch takes: it goes forward and backward over tensors that have shapes and no numbers.

That is torch's FakeTensorMode. The bytes of every storage are counted for as long as it would live. So what autograd
keeps is not in a table here: it follows from the model's own code, with every option, and from torch's choice of
attention.

    bytes alive   |             ___
                  |          __/   \\__             peak      activations and temporaries
                  |       __/         \\__          kept      activations: what backward waits for
                  |    __/               \\__
                  | __/                     \\__
                  +-------------------------------
                     forward  loss  backward
"""

import contextlib
import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hvdtrain.config import RunConfig
from hvdtrain.cut.blueprint import Blueprint, make_real
from hvdtrain.cut.flows import Layout
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.batch import AnyBatch
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.models.layers import AnyAttention
from hvdtrain.models.pieces import Staged
from hvdtrain.models.products import no_products
from hvdtrain.models.recompute import AnyBlock
from hvdtrain.planner.workload import build_model
from hvdtrain.tasks import make_task

_SENDS = {"sum": 2, "gather": 1, "scatter_sum": 1}  # times (parts - 1) / parts of the larger tensor, as a ring
AttentionKind = Literal["flash", "math", "fused"]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a microbatch beyond weights, their gradients and the batch itself; of a stage of the model.

    ``before_loss``: when the stage has its output; ``kept``: when its backward can begin; ``of_layer``: of ``kept``, by
    a block on average; ``peak``: at any time. ``handed_on``: what goes to the next stage. ``summed``: what a rank sends
    over the tensor axis, forward and backward.
    """

    before_loss: int
    kept: int
    of_layer: int
    peak: int
    handed_on: int = 0
    summed: int = 0


def dry_run(
    config: RunConfig,
    facts: CorpusFacts,
    rows: int,
    positions: int,
    attention: AttentionKind = "flash",
    training: bool = True,
    shapes_only: bool = True,
) -> Footprint:
    """One microbatch forward and backward through a whole model, or one batch of an evaluation; see ``dry_stages``."""
    model = Blueprint(partial(build_model, config, facts)).model
    return dry_stages([model], config, rows, positions, attention, training, shapes_only)[0]


def dry_stages(
    stages: Sequence[Staged],
    config: RunConfig,
    rows: int,
    positions: int,
    attention: AttentionKind = "flash",
    training: bool = True,
    shapes_only: bool = True,
) -> list[Footprint]:
    """One microbatch forward and backward through each of a model's stages, or one batch of an evaluation, counting
    bytes as on a CPU.

    stages: in order, on the meta device; they stay there.
    attention: math keeps T x T scores; flash does not, but on a CPU it knows no dropout and leaves that to math; fused
    is a GPU's, which does. Causal rows on a CPU go by models/products.py, whatever is said here.
    shapes_only: with tensors that have no numbers; False: with real ones (for tests).
    """
    backends = [SDPBackend.MATH] if attention == "math" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    found, flow = [], Layout.of(())
    copies = [copy.deepcopy(stage).train(training) for stage in stages]
    own = no_products() if attention == "fused" else contextlib.nullcontext()
    with FakeTensorMode() if shapes_only else contextlib.nullcontext(), sdpa_kernel(backends), own:
        for number, model in enumerate(copies):
            make_real(model, torch.device("cpu"))
            if attention == "fused":
                for module in model.modules():
                    if isinstance(module, AnyAttention):
                        module.dropout = 0.0
            footprint, flow = _run(model, flow, config, (rows, positions), number + 1 == len(copies))
            found.append(footprint)
    return found


def _run(
    model: Staged, layout: Layout, config: RunConfig, shape: tuple[int, int], is_last: bool
) -> tuple[Footprint, Layout]:
    """Of one stage, real or fake, which is given a flow of that layout; and the layout of what it hands on."""
    precision, task = PRECISIONS[config.precision], make_task(config.task)
    if precision.weights:
        _convert(model, precision.weights)
    _give_gradients(model, dropped=bool(precision.weights))
    batch = task.example(*shape)
    live = LiveBytes(_tensors_of(model, batch), config.mesh.tensor)
    autocast = precision.autocasting(torch.device("cpu"))
    with live, _noting(model, live) as of_layers, torch.set_grad_enabled(model.training):
        came = tuple(
            torch.zeros(shape, dtype=dtype, requires_grad=model.training)
            for shape, dtype in zip(layout.shapes, layout.dtypes, strict=True)
        )
        kept = 0
        with autocast:
            flow = model.stage(came, *task.inputs(batch))
            before_loss = live.now
            if is_last and model.training:
                flow = (task.loss(model, flow[-1], batch).total,)
            elif is_last:
                task.measure(model, flow[-1], batch)
        made = Layout.of(flow)
        handed_on = 0 if is_last else sum(tensor.nbytes for tensor in flow)
        if model.training:
            edges = [get_gradient_edge(tensor) for tensor in flow]
            del flow
            kept = live.now
            grads = [torch.ones(shape, dtype=dtype) for shape, dtype in zip(made.shapes, made.dtypes, strict=True)]
            torch.autograd.backward(edges, grads)
    of_layer = round(sum(of_layers) / max(1, len(of_layers)))
    return Footprint(before_loss, kept, of_layer, live.peak, handed_on, live.summed), made


class LiveBytes(TorchDispatchMode):
    """While it is entered: how many bytes the storages have that operations made (``now``), and had at most (``peak``).

    Storages of ``known`` tensors count nothing. parts: of the tensor axis, over which ``summed`` bytes were sent.
    """

    def __init__(self, known: Iterable[torch.Tensor], parts: int = 1):
        super().__init__()
        self.now = self.peak = self.summed = 0
        self._parts = parts
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
        if func.namespace == "hvdtrain":  # cut/crossings.py
            times = _SENDS.get(args[1], 0)
            self.summed += times * (self._parts - 1) * max(args[0].nbytes, tensors[0].nbytes) // self._parts
        return made

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._alive:
            size = storage.nbytes()
            self._alive[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage), size))
            self.now += size

    def _forget(self, number: int, size: int, _: Any) -> None:
        del self._alive[number]
        self.now -= size


@contextlib.contextmanager
def _noting(model: nn.Module, live: LiveBytes) -> Iterator[list[int]]:
    """Within: what each block of the model adds to the bytes alive."""
    of_layers: list[int] = []
    before: list[int] = []

    def enter(*_: Any) -> None:
        before.append(live.now)

    def leave(*_: Any) -> None:
        of_layers.append(live.now - before.pop())

    hooks = []
    for module in model.modules():
        if isinstance(module, AnyBlock):
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield of_layers
    finally:
        for hook in hooks:
            hook.remove()


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """``model.to(dtype)``, which shares nothing of tied weights where tensors are fake."""
    converted: dict[nn.Parameter, nn.Parameter] = {}
    for parameter in list(model.parameters()):
        converted[parameter] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is not None:
                module._parameters[name] = converted[own]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def _give_gradients(model: nn.Module, dropped: bool) -> None:
    """As sync/allreduce.py has them: there before backward; of 16-bit weights added up elsewhere, and dropped."""

    def drop(parameter: torch.Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if dropped:
            parameter.register_post_accumulate_grad_hook(drop)
        else:
            parameter.grad = torch.zeros_like(parameter)


def _tensors_of(model: nn.Module, batch: AnyBatch) -> list[torch.Tensor]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    of_batch = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    return [*model.parameters(), *model.buffers(), *gradients, *of_batch]
