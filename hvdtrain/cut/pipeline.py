"""The replica whose layers lie on several ranks, one stage after another: it runs the lists of schedules.py.

    rank 0   stage 0   [embed, attention 0, feed-forward 0, attention 1]
                          | hidden states                  ^ their gradients
    rank 1   stage 1   [feed-forward 1, attention 2, feed-forward 2, end]   -> loss, which all ranks are told

A pass of a microbatch takes what the stage before has sent, or behind it; receives are posted a pass before, and sends
are not waited for. Random numbers are those of (step, replica, microbatch, place in the model), so that a pipeline
draws what one process draws.
"""

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hvdtrain.comm.mesh import Mesh
from hvdtrain.cut.blueprint import Blueprint, Placed, make_real
from hvdtrain.cut.compiling import compile_model, uncompiled
from hvdtrain.cut.cut import Passed
from hvdtrain.cut.flows import Flows, Incoming, Layout
from hvdtrain.cut.halves import Halves
from hvdtrain.cut.lockstep import Lockstep
from hvdtrain.cut.precision import Precision
from hvdtrain.cut.schedules import (
    SCHEDULES,
    Action,
    Backward,
    Forward,
    InputGradient,
    Pass,
    Receive,
    Send,
    WeightGradient,
    with_transfers,
)
from hvdtrain.cut.stages import Stage
from hvdtrain.data.batch import AnyBatch
from hvdtrain.models.draws import mixed
from hvdtrain.models.pieces import Flow, Staged, keep
from hvdtrain.slices import Slice
from hvdtrain.tasks.task import Task

Inputs = Sequence[torch.Tensor | None]
Shapes = tuple[torch.Size | None, ...]  # of a microbatch's inputs, on which the layout of its flows depends


class Stages(nn.ModuleList):
    """What a rank has of a model: copies that were pruned. A parameter that two of them have is one tensor; its names
    are those of the whole model.
    """

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        seen: set[int] = set()
        for model in self:
            for name, parameter in model.named_parameters(prefix, recurse, remove_duplicate):
                if not remove_duplicate or id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter


@dataclass(frozen=True)
class Held:
    """The fp32 weights of a rank's stages. numbers: which they are, of ``count`` in all. uses: see ``Replica``.

    share: of the model's FLOPs, what these stages make.
    """

    models: Stages
    numbers: Sequence[int]
    count: int
    slices: Sequence[Slice]
    uses: Sequence[int]
    share: float


def hold(
    blueprint: Blueprint,
    model: Staged,
    mesh: Mesh,
    device: torch.device,
    stages: Sequence[Stage],
    placed: Mapping[str, Placed] | None = None,
) -> Held:
    """This rank's share of ``model``, a copy of the blueprint's whose layers may be cut already, see ``placed``
    (collective).
    """
    pieces, ranks = blueprint.model.pieces(), mesh.pipe.size
    numbers = range(mesh.pipe.rank, len(stages), ranks)
    same = {id(parameter): parameter for parameter in model.parameters()}
    models = Stages(copy.deepcopy(model, dict[int, Any](same)) for _ in numbers)
    for number, one in zip(numbers, models, strict=True):
        keep(cast(Staged, one), pieces, [pieces[piece] for piece in stages[number].pieces])
    make_real(models, device)
    slices = blueprint.slices(models, mesh, placed, _ranks_having(blueprint, stages, ranks))
    uses = [sum(any(piece.tensor is p for p in one.parameters()) for one in models) for piece in slices]
    share = sum(stages[number].cost for number in numbers) / sum(stage.cost for stage in stages)
    return Held(models.train(), numbers, len(stages), slices, uses, share)


def _ranks_having(blueprint: Blueprint, stages: Sequence[Stage], ranks: int) -> dict[str, frozenset[int]]:
    """Of each parameter the ranks of the pipe that hold it."""
    pieces = blueprint.model.pieces()
    having: dict[str, set[int]] = {name: set() for name in blueprint.wholes}
    for number, stage in enumerate(stages):
        modules = tuple(f"{name}." for piece in stage.pieces for name in pieces[piece].needs)
        for path, name in blueprint.names.items():
            if path.startswith(modules):
                having[name].add(number % ranks)
    return {name: frozenset(found) for name, found in having.items()}


class Pipeline:
    """See ``Replica``. schedule: of ``SCHEDULES``; compile: of ``compiling.COMPILES``."""

    def __init__(self, held: Held, mesh: Mesh, precision: Precision, schedule: str, compile: str = "none"):
        pipe = mesh.pipe
        self._held, self._pipe, self._precision = held, pipe, precision
        self._share = held.share / mesh.tensor.size
        self.device = next(held.models.parameters()).device
        self._compute = copy.deepcopy(held.models).to(precision.weights) if precision.weights else held.models
        self.slices, self.uses = held.slices, held.uses
        copies = {id(w): c for w, c in zip(held.models.parameters(), self._compute.parameters(), strict=True)}
        self.computing: Sequence[torch.Tensor] = [copies[id(piece.tensor)] for piece in self.slices]
        self._halves = Halves()
        if schedule == "zero_bubble":
            self._halves.use(self._compute)
        for model in self._compute:
            compile_model(model, compile)
        self._stage = {number: cast(Staged, model) for number, model in zip(held.numbers, self._compute, strict=True)}
        self._flows = Flows(pipe, self.device)
        self._layouts: dict[tuple[int, Shapes], Layout] = {}
        self._actions = cache(lambda count: self._actions_for(schedule, count))
        self.answering = Lockstep(self._stage, held.count, pipe, self._flows, self.device)

    def forward_backward(
        self, microbatches: Sequence[AnyBatch], task: Task, seed: int, loss_scale: torch.Tensor | None = None
    ) -> Passed:
        step = _Step(self, microbatches, task, seed, loss_scale)
        for action in self._actions(len(microbatches)):
            step.take(action)
        self._flows.settle()
        total = self._pipe.broadcast(step.total, root=self._pipe.size - 1)
        flops = sum(task.training_flops(self._compute[0], batch) for batch in microbatches)
        weights = [batch.target_tokens for batch in cast(Sequence[Any], microbatches)]
        return Passed(total, weights, round(flops * self._share))

    @torch.no_grad()
    def measure(self, batches: Iterable[AnyBatch], task: Task) -> torch.Tensor | None:
        sums, is_empty = None, True
        self._compute.eval()
        with uncompiled():  # other shapes than in training would be compiled anew
            for batch in batches:
                is_empty = False
                with self._precision.autocasting(self.device):
                    measured = self._measured(batch.to(self.device), task)
                if measured is not None:
                    sums = measured if sums is None else sums + measured
        self._compute.train()
        return None if is_empty else self.answering.hand_out(sums)

    @torch.no_grad()
    def publish(self) -> None:
        if self._compute is not self._held.models:
            torch._foreach_copy_(list(self._compute.parameters()), list(self._held.models.parameters()))

    def _measured(self, batch: AnyBatch, task: Task) -> torch.Tensor | None:
        """The task's sums, on the last rank; elsewhere None."""
        output = self.answering.output(task.inputs(batch), batch.rows_at_once)
        decoded = task.measure_decoded(self.answering, batch)
        if output is None:
            return None
        sums = task.measure(self._stage[self._held.count - 1], output, batch)
        return sums if decoded is None else torch.cat([sums, decoded.to(sums.device)])

    def _actions_for(self, schedule: str, microbatches: int) -> list[Action]:
        ranks = self._pipe.size
        passes = SCHEDULES[schedule](ranks, microbatches, self._held.count // ranks)
        return with_transfers(passes)[self._pipe.rank]


@dataclass
class _Alive:
    """Of a microbatch between forward and backward. came: what the stage was given; edges: where backward begins in
    what it made, of which the numbers themselves are not needed any more; of a tensor without a gradient None.
    """

    came: Flow
    edges: list[GradientEdge | None]


class _Step:
    """Forward and backward of a step's microbatches on this rank, one action at a time. total: the loss, fp64."""

    def __init__(
        self,
        pipeline: Pipeline,
        microbatches: Sequence[AnyBatch],
        task: Task,
        seed: int,
        loss_scale: torch.Tensor | None,
    ):
        self._of, self._microbatches, self._task, self._seed = pipeline, microbatches, task, seed
        self._inputs = [task.inputs(batch) for batch in microbatches]
        self._shapes = [tuple(None if x is None else x.shape for x in inputs) for inputs in self._inputs]
        self._scale = torch.ones((), device=pipeline.device) if loss_scale is None else loss_scale
        self.total = torch.zeros((), dtype=torch.float64, device=pipeline.device)
        self._alive: dict[tuple[int, int], _Alive] = {}
        self._made: dict[Pass, Flow] = {}
        self._later: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._waiting: dict[int, deque[Pass]] = defaultdict(deque)  # of each source: what it sends, not posted yet
        self._coming: dict[Pass, Incoming] = {}

    def take(self, action: Action) -> None:
        match action:
            case Receive(made, source):
                self._waiting[source].append(made)
                self._post(source)
            case Send(made, to):
                key = self._key(made)
                flow, is_new = self._made.pop(made), key not in self._of._layouts
                self._of._layouts.setdefault(key, Layout.of(flow))
                self._of._flows.send(flow, to, with_layout=is_new)
            case Forward():
                self._forward(action)
            case Backward() | InputGradient():
                self._backward(action)
            case WeightGradient(stage, microbatch):
                for make in self._later.pop((stage, microbatch)):
                    make()

    def _forward(self, step: Forward) -> None:
        stage, m, of = step.stage, step.microbatch, self._of
        came = self._take(Forward(stage - 1, m)) if stage else ()
        for tensor in came:
            tensor.requires_grad_()
        model = of._stage[stage]
        model.draws.begin(mixed(self._seed, m), of.device)
        with of._precision.autocasting(of.device):
            flow = model.stage(came, *self._inputs[m])
            if stage + 1 == of._held.count:
                loss = self._task.loss(model, flow[-1], self._microbatches[m])
                self.total += loss.total.detach()
                flow = (loss.total * self._scale,)
            else:
                self._made[step] = flow
        self._alive[stage, m] = _Alive(came, [get_gradient_edge(x) if x.requires_grad else None for x in flow])

    def _backward(self, step: Backward | InputGradient) -> None:
        stage, m, of = step.stage, step.microbatch, self._of
        is_last = stage + 1 == of._held.count
        grads = (torch.ones_like(self._scale),) if is_last else self._take(type(step)(stage + 1, m))
        alive = self._alive.pop((stage, m))
        pairs = [(edge, grad) for edge, grad in zip(alive.edges, grads, strict=True) if edge is not None]
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
        if stage:
            self._made[step] = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in alive.came)
        if isinstance(step, InputGradient):
            self._later[stage, m] = of._halves.take()

    # --- what comes ---

    def _take(self, made: Pass) -> Flow:
        """Wait for what another stage has made."""
        source = made.stage % self._of._pipe.size
        while made not in self._coming:
            self._post(source, first=True)
        return self._coming.pop(made).wait()

    def _post(self, source: int, first: bool = False) -> None:
        """Make room for what ``source`` will send, as far as layouts are known; first: for the first in any case."""
        waiting, layouts = self._waiting[source], self._of._layouts
        while waiting and (first or self._key(waiting[0]) in layouts):
            made = waiting.popleft()
            key, first = self._key(made), False
            self._coming[made] = incoming = self._of._flows.receive(layouts.get(key), source)
            layouts.setdefault(key, incoming.layout)

    def _key(self, made: Pass) -> tuple[int, Shapes]:
        """Which layout it has: of what crosses from this stage to the next, or comes back as its gradient."""
        return made.stage if isinstance(made, Forward) else made.stage - 1, self._shapes[made.microbatch]
