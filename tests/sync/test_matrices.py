"""Newton-Schulz steps over ranks: who makes what, and that every way is the weights of one process."""

import pytest
import torch
from learner import Learner, Recipe, furthest, held, trained
from threads import ThreadGroup, on_ranks

from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.options import TransformerOptions
from hvdtrain.optim.muon import NewtonSchulz, WholeMatrices
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.slices import Rect, Slice
from hvdtrain.sync import SyncOptions, matrices
from hvdtrain.sync.matrices import Block, Routes, SpreadMatrices
from hvdtrain.sync.parameter_server import ParameterServerOptions
from hvdtrain.sync.zero import ZeroOptions

# Of each tensor's norm after a few steps: the same products, of gradients that were added in another order.
TOLERANCE = 1e-4
MODEL = {"activation": "swiglu", "qkv_bias": "no"}  # three matrices in one tensor, two in another
STEPS = 4


def muon(**options: object) -> OptimOptions:
    return OptimOptions(name="muon", lr=0.01, eps=1e-5, muon={"share": "always", **options})


# --- the routes --------------------------------------------------------------------------------------------------


def rows(begin: int, end: int, width: int = 4) -> Rect:
    return Rect((begin, 0), (end - begin, width))


def test_ranks_that_hold_all_share_the_work():
    """The costly ones first, each to whom has least to do: 8 + 1 and 4 + 4 of what a product takes."""
    matrices = [("a", rows(0, 4)), ("b", rows(0, 8, 8)), ("c", rows(0, 4)), ("d", rows(0, 1, 1))]
    whole = {name: [place] for name, place in matrices}
    routes = Routes(matrices, [whole, whole])
    assert routes.is_alike
    assert routes.owners == {1: 0, 0: 1, 2: 1, 3: 1}
    assert routes.gathered == [[[], []], [[], []]]
    assert routes.returned[0] == [[Block(1, rows(0, 8, 8))]] * 2
    assert {block.matrix for block in routes.returned[1][0]} == {0, 2, 3}


def test_pieces_go_to_whom_has_most_and_come_back():
    """A tensor of two matrices, of which rank 0 has rows 0 to 5 and rank 1 the other six; each gets back its own."""
    matrices = [("a", rows(0, 4)), ("a", rows(4, 12))]
    routes = Routes(matrices, [{"a": [rows(0, 6)]}, {"a": [rows(6, 12)]}])
    assert routes.held == [[Block(0, rows(0, 4)), Block(1, rows(4, 6))], [Block(1, rows(6, 12))]]
    assert routes.owners == {0: 0, 1: 1}
    assert routes.gathered == [[[], [Block(1, rows(4, 6))]], [[], []]]
    assert routes.returned == [[[], []], [[Block(1, rows(4, 6))], []]]


def test_what_several_hold_comes_from_the_nearest():
    """Two replicas of two ranks each: the owner asks its own replica, and all four get their halves."""
    left, right = Rect((0, 0), (4, 2)), Rect((0, 2), (4, 2))
    routes = Routes([("a", rows(0, 4))], [{"a": [half]} for half in (left, right, left, right)])
    assert routes.owners == {0: 0}
    assert routes.gathered[1][0] == [Block(0, right)]
    assert not any(block for rank in (2, 3) for block in routes.gathered[rank])
    assert routes.returned[0] == [[], [Block(0, right)], [Block(0, left)], [Block(0, right)]]


def test_a_gap_is_our_own_mistake():
    with pytest.raises(AssertionError, match="what ranks hold of a has a gap"):
        Routes([("a", rows(0, 4))], [{"a": [rows(0, 2)]}, {"a": [rows(3, 4)]}])


# --- as the loop uses them ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return held(trained(1, STEPS, optim=muon(), model=MODEL)[0])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shared_is_what_each_would_make(ranks: int, precision: str):
    """To the bit, on all ranks (``trained`` compares them); and each rank makes some."""
    shared = trained(ranks, STEPS, optim=muon(precision=precision), model=MODEL)
    each = trained(ranks, STEPS, optim=muon(precision=precision, share="never"), model=MODEL)
    expected = held(each[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in held(shared[0]).items())
    owners = [learner.optimizer._matrices.routes.owners for learner in shared]
    assert set(owners[0].values()) == set(range(ranks))
    assert all(other == owners[0] for other in owners)


@pytest.mark.parametrize(
    ("ranks", "recipe"),
    [
        (2, {"sync": SyncOptions(name="zero", zero=ZeroOptions(stage=1, bucket_mib=2e-3))}),
        (3, {"sync": SyncOptions(name="zero", zero=ZeroOptions(stage=2, bucket_mib=2e-3))}),
        (2, {"sync": SyncOptions(name="parameter_server")}),
        (4, {"sync": SyncOptions(name="parameter_server", parameter_server=ParameterServerOptions(servers=2))}),
        (2, {"mesh": MeshOptions(tensor=2)}),
        (4, {"mesh": MeshOptions(tensor=2)}),
        (4, {"mesh": MeshOptions(tensor=2), "sync": SyncOptions(name="zero")}),
        (4, {"mesh": MeshOptions(pipeline=2)}),
    ],
    ids=["zero 1", "zero 2", "servers 0", "servers 2", "tensor", "tensor x 2", "tensor x zero", "pipeline x 2"],
)
def test_pieces_are_made_as_wholes(ranks: int, recipe: dict, alone: dict[str, torch.Tensor]):
    """Whatever a rank holds after the steps is what one process has there."""
    for learner in trained(ranks, STEPS, optim=muon(), model=MODEL, **recipe):
        expected = {}
        for piece in learner.engine.replica.slices:
            parts = [
                alone[piece.name][place.index_in(Rect((0,) * len(piece.whole), piece.whole))] for place in piece.places
            ]
            expected[piece.name] = torch.cat(parts)
        assert furthest(held(learner), expected) <= TOLERANCE


def test_an_odd_number_of_two_byte_numbers_travels():
    def work(group: ThreadGroup) -> None:
        weight, made = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), NewtonSchulz(torch.bfloat16)
        piece = Slice("a", weight, weight.shape, (rows(0, 3, 3),), group)
        ways = SpreadMatrices([piece], {"a": [3]}, group, made, weight.device), WholeMatrices({weight: [3]}, made)
        shared, each = (
            [update.clone() for _, run in way.updates([weight], copy_weights) for update in run] for way in ways
        )
        assert len(shared) == 1 and torch.equal(shared[0], each[0])

    def copy_weights(weights: list[torch.Tensor], into: list[torch.Tensor]) -> None:
        torch._foreach_copy_(into, weights)

    on_ranks(2, work)


def test_halves_made_apart_would_be_others(alone: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch):
    """Or the test above would hold without asking anybody."""
    parts = block_matrices(alone, TransformerOptions(layers=2, heads=2, width=16, ff_ratio=2.0, **MODEL))
    halved = {name: [n // 2 for n in rows for _ in range(2)] for name, rows in parts.items()}
    assert halved["blocks.0.attention.qkv.weight"] == [8] * 6
    monkeypatch.setattr("learner.block_matrices", lambda *_: halved)
    assert furthest(held(trained(1, STEPS, optim=muon(), model=MODEL)[0]), alone) > 100 * TOLERANCE


def test_the_faster_way_is_found_and_said():
    """auto: a trial of both on all ranks, which then agree."""

    def work(group: ThreadGroup) -> tuple[bool, list[str]]:
        learner = Learner(group, Recipe(optim=muon(share="auto"), model=MODEL))
        learner.train(1)
        return isinstance(learner.optimizer._matrices, SpreadMatrices), learner.notes

    found = on_ranks(2, work)
    assert found[0] == found[1]
    (note,) = found[0][1]
    assert note.startswith("Newton-Schulz steps of all matrices: ")
    assert note.endswith("the ranks share them" if found[0][0] else "each makes all")


def test_ranks_that_would_get_other_bits_share(monkeypatch: pytest.MonkeyPatch):
    def write(weights: list[torch.Tensor], into: list[torch.Tensor]) -> None:
        for tensor in into:
            tensor.copy_(torch.rand(tensor.shape))  # another on each rank

    monkeypatch.setattr(matrices, "_write_trial", write)

    def work(group: ThreadGroup) -> tuple[bool, list[str]]:
        learner = Learner(group, Recipe(optim=muon(share="auto"), model=MODEL))
        return isinstance(learner.optimizer._matrices, SpreadMatrices), learner.notes

    for is_spread, (note,) in on_ranks(2, work):
        assert is_spread
        assert "would not all get the same bits" in note


def test_a_run_goes_on_on_other_ranks(tmp_path):
    """Saved by two ranks with ZeRO, taken up by one, and by two that are cut."""
    recipe = {"optim": muon(), "model": MODEL}
    zero = SyncOptions(name="zero", zero=ZeroOptions(stage=1, bucket_mib=2e-3))
    folder = on_ranks(2, lambda group: Learner(group, Recipe(**recipe, sync=zero)).train(2).save(tmp_path))[0]
    (one,) = on_ranks(1, lambda group: Learner(group, Recipe(**recipe), folder).train(2))
    expected = held(trained(1, 4, **recipe)[0])
    assert furthest(held(one), expected) <= TOLERANCE
    for learner in on_ranks(2, lambda g: Learner(g, Recipe(**recipe, mesh=MeshOptions(tensor=2)), folder).train(2)):
        whole = {piece.name: piece.tensor.detach() for piece in learner.engine.replica.slices if piece.is_whole}
        assert furthest(whole, {name: expected[name] for name in whole}) <= TOLERANCE


def test_replicas_apart_make_their_own():
    """Local SGD: what an optimizer keeps of matrices and of the rest is averaged, each as it is."""
    learners = trained(2, 4, optim=muon(), model=MODEL, sync=SyncOptions(name="local_sgd", local_sgd={"every": 2}))
    states = [{p.name: set(one.optimizer.state[p.tensor]) for p in one.sync.moves} for one in learners]
    assert states[0] == states[1]
    assert states[0]["blocks.0.attention.qkv.weight"] == {"momentum_buffer"}
    assert states[0]["embedding.weight"] == {"step", "exp_avg", "exp_avg_sq"}
