"""Layers spread over the ranks of an axis, in fp32, against one process: a step's gradients, twenty steps, evaluation,
dropout. At 2 ranks over two parts; at 4 over four, and over two in each of two replicas; at 1 the model is whole.
"""

import zlib
from collections.abc import Callable, Mapping

import pytest
import torch
from conftest import WORLD
from parts import SHORT_BIAS, Case, batch_of

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import Mesh, MeshOptions, make_mesh
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint, fill_slices
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.engine import Engine
from hvdtrain.models import layers
from hvdtrain.models.lora import LoraOptions
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Update
from hvdtrain.slices import whole_rect
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.tasks import TaskOptions, make_task

PARTS = [parts for parts in (2, 4) if WORLD.size % parts == 0] or [1]
CPU = torch.device("cpu")
# AdamW shall not blow up to full steps what is but rounding: all there is of the gradient of a span head's bias.
OPTIM = OptimOptions(eps=1e-3)
GRADIENTS, PARAMETERS, SCORES = 2e-6, 1e-5, 1e-6  # relative, norms of each tensor
NOTHING = 1e-5  # of the norm of all: below it a gradient is but rounding, like that of a bias that shifts all scores
STEPS, MICROBATCHES, LR = 20, 2, 1e-3  # at ten times the rate rounding grows by itself, in one process too

CASES = [
    Case("lm", {"preset": "llama", "kv_heads": 4}),
    Case("lm", {"preset": "gpt2"}, positions=7, lora=LoraOptions(rank=2, targets="all"), only_adapters=True),
    Case("classify", {"preset": "bert"}),
    Case("mlm", {"preset": "bert"}, sequence=False),
    Case("span_qa", {"positions": "rotary"}),
    Case("seq2seq", {"preset": "t5", **SHORT_BIAS}),
]


class Run:
    """A training of ``case`` over the ranks of ``mesh``, each of whose replicas takes its microbatches of a step."""

    def __init__(self, case: Case, mesh: Mesh):
        self.task, self.mesh, self.case = make_task(TaskOptions(name=case.task)), mesh, case
        blueprint = Blueprint(case.make)
        cut = CutOptions(sequence=case.sequence)
        self.replica = make_replica(blueprint, Making(mesh, PRECISIONS["fp32"], CPU, self.task, cut))
        whole = case.whole(dtype=torch.float32, factor=1.0)
        fill_slices(self.replica.slices, ((name, p.detach()) for name, p in whole.named_parameters()))
        sync = make_sync(SyncOptions(), self.replica.slices, self.replica.computing, mesh, self.replica.uses)
        optimizer = make_optimizer([piece.tensor for piece in sync.moves], OPTIM)
        update = Update(optimizer, 1.0, Guard(GuardOptions(), CPU))
        self.engine = Engine(self.replica, sync, update, mesh, seed=1)

    def forward_backward(self, step: int) -> None:
        seeds = range(MICROBATCHES * step + self.mesh.number, MICROBATCHES * (step + 1), self.mesh.replicas)
        self.engine.forward_backward([batch_of(self.case.task, self.case.positions, s) for s in seeds], self.task, step)
        self.engine.finish()

    def gradients(self) -> dict[str, torch.Tensor]:
        self.forward_backward(0)
        return {piece.name: piece.tensor.grad.clone() for piece in self.replica.slices if piece.tensor.requires_grad}

    def train(self) -> dict[str, torch.Tensor]:
        for step in range(STEPS):
            self.forward_backward(step)
            self.engine.step(LR, step)
        return {piece.name: piece.tensor.detach() for piece in self.replica.slices}

    def scores(self) -> Mapping[str, float]:
        return self.engine.evaluate([batch_of(self.case.task, self.case.positions, 99 + self.mesh.number)], self.task)

    def close(self) -> None:
        self.engine.close()


@pytest.fixture(scope="module")
def mesh_of(horovod: HorovodGroup) -> Callable[[int], Mesh]:
    made: dict[int, Mesh] = {}

    def mesh(parts: int) -> Mesh:
        if parts not in made:
            made[parts] = make_mesh(horovod, MeshOptions(tensor=parts))
        return made[parts]

    return mesh


def alone() -> Mesh:
    return make_mesh(LocalGroup(), MeshOptions())


def exact_gradients(case: Case) -> dict[str, torch.Tensor]:
    """Of the whole model, in fp64: in fp32 one process is 1.6e-6 away from them itself (an adapter's, seen), and so is
    the one that is compared, each in its own direction.
    """
    model, task = case.whole(dtype=torch.float64, factor=1.0), make_task(TaskOptions(name=case.task))
    for seed in range(MICROBATCHES):
        batch = batch_of(case.task, case.positions, seed)
        task.loss(model, model(*task.inputs(batch)), batch).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(run: Run, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """Of each tensor that is spread, the distance over all parts; together: an error on one rank alone would hang."""
    squares = {}
    for piece in run.replica.slices:
        if piece.name not in expected:  # frozen
            continue
        truth = expected[piece.name]
        own = torch.cat([truth[place.index_in(whole_rect(truth.shape))] for place in piece.places])
        square = (found[piece.name] - own).double().square().sum() / piece.copies
        squares[piece.name] = run.mesh.tensor.sum(square.reshape(1)).item()
    norms = {name: float(torch.linalg.norm(expected[name])) for name in squares}
    of_all = sum(norm**2 for norm in norms.values()) ** 0.5
    bounds = {name: tolerance * (norm if norm > NOTHING * of_all else of_all) for name, norm in norms.items()}
    far = [
        f"{name}: {squares[name] ** 0.5:.1e} of {norms[name]:.1e}"
        for name in norms
        if squares[name] > bounds[name] ** 2
    ]
    assert not far


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("parts", PARTS)
def test_as_one_process(mesh_of: Callable[[int], Mesh], case: Case, parts: int):
    ours, theirs = Run(case, mesh_of(parts)), Run(case, alone())
    check(ours, ours.gradients(), exact_gradients(case), GRADIENTS)
    check(ours, ours.train(), theirs.train(), PARAMETERS)
    if case.task != "span_qa":  # which scores whole questions, of its shards
        found = ours.scores()
        ours.mesh.world.agree(found, "scores of an evaluation")
        if ours.mesh.replicas == 1:
            assert found == pytest.approx(theirs.scores(), rel=SCORES)
    ours.engine.check(STEPS)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("positions", [8, 7], ids=["split", "whole stream"])
def test_dropout_is_alike_where_numbers_are(
    mesh_of: Callable[[int], Mesh], monkeypatch: pytest.MonkeyPatch, positions: int
):
    """Which random numbers come next, wherever some are drawn, on all parts: of what all have, the same; of own heads,
    hidden units and positions, each part's own.
    """
    lora = LoraOptions(rank=2, targets="all", dropout=0.1)
    run = Run(Case("lm", {"dropout": 0.5, "layers": 1}, positions=positions, lora=lora), mesh := mesh_of(PARTS[-1]))
    names = {module: name for name, module in run.replica.compute.named_modules()}
    drawn: list[tuple[str, int]] = []

    def noting(name: Callable[[tuple], str], plain: Callable) -> Callable:
        def noted(*given, **more):
            drawn.append((name(given), zlib.crc32(torch.default_generator.get_state().numpy())))
            return plain(*given, **more)

        return noted

    monkeypatch.setattr(torch.nn.Dropout, "forward", noting(lambda given: names[given[0]], torch.nn.Dropout.forward))
    monkeypatch.setattr(layers, "attend", noting(lambda _: "probabilities", layers.attend))
    run.forward_backward(0)
    run.close()
    of_parts = mesh.tensor.all_gather_object(drawn)
    found = [(name, len({part[at][1] for part in of_parts})) for at, (name, _) in enumerate(drawn)]
    own = mesh.tensor.size
    stream = own if positions % own == 0 else 1
    assert found == [
        ("dropout", 1),
        ("blocks.0.attention.qkv.dropout", 1),
        ("probabilities", own),
        ("blocks.0.attention.out.dropout", own),
        ("blocks.0.dropout", stream),
        ("blocks.0.feed_forward.up.dropout", 1),
        ("blocks.0.feed_forward.out.dropout", own),
        ("blocks.0.dropout", stream),
    ] * (MICROBATCHES // mesh.replicas)
    assert len({state for _, state in drawn}) == len(drawn), "no numbers are drawn twice"
