"""ZeRO is all-reduce with less on each rank: the same weights, states in shares, checkpoints that fit any number."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from checkpoints import assert_equal, tensors_in
from hypothesis import given
from hypothesis import strategies as st
from learner import Learner, Recipe, distances, furthest, held, trained
from threads import ThreadGroup, in_process, on_ranks
from torch import nn

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import MeshOptions, whole_replicas
from hvdtrain.cut.options import CutOptions
from hvdtrain.errors import ConfigError
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Update
from hvdtrain.slices import Rect, Slice, tile, whole_rect, whole_slices
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.sync.buckets import make_runs
from hvdtrain.sync.shards import rectangles_of, shard_of
from hvdtrain.sync.sync import Told
from hvdtrain.sync.zero import ZeroOptions, bytes_of

BUCKET_MIB = 4e-3  # a thousand numbers; the tiny decoder has 5,300
STAGES = pytest.mark.parametrize("stage", [1, 2])


def zero(stage: int, wire: str = "fp32", bucket_mib: float = BUCKET_MIB) -> SyncOptions:
    return SyncOptions(name="zero", zero=ZeroOptions(stage=stage, bucket_mib=bucket_mib, wire=wire))


def optim(name: str = "adamw", **more: object) -> OptimOptions:
    return OptimOptions(**{"name": name, "lr": 0.01, "eps": 1e-5, **more})


# --- shares ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_a_range_is_a_few_rectangles_in_order(shape: list[int], data: st.DataObject):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    numbers, rects = torch.arange(size).view(shape), rectangles_of(start, stop, shape)
    found = [n for rect in rects for n in numbers[rect.index_in(whole_rect(shape))].flatten().tolist()]
    assert found == list(range(start, stop))
    assert len(rects) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_shares_are_everything_once(ranks: int):
    """Of whole tensors, and of one whose piece here is two rectangles, as of a fused projection."""
    rects = (Rect((0, 0), (5, 7)), Rect((10, 0), (5, 7)))
    wholes = {"a": whole_rect((3,)), "fused": whole_rect((20, 7)), "c": whole_rect((2, 3, 5))}
    covered: dict[str, list[Rect]] = {name: [] for name in wholes}
    for group in in_process(ranks):
        slices = [
            Slice(name, torch.zeros((10, 7) if name == "fused" else shape), torch.Size(shape), places, group)
            for name, (_, shape) in wholes.items()
            for places in [rects if name == "fused" else (whole_rect(shape),)]
        ]
        (run,) = make_runs(slices, 1 << 20, in_parts=True)
        flat = run.empty()
        for number, piece in enumerate(slices):  # each number says which it is
            view = run.views(flat)[[member for member, _ in run.members].index(number)]
            whole = torch.arange(1.0, 1 + piece.whole.numel()).view(piece.whole)
            view.copy_(torch.cat([whole[place.index_in(whole_rect(piece.whole))] for place in piece.places]))
        for _, at, piece in shard_of(run, slices, flat, ranks):
            (place,) = piece.places
            whole = torch.arange(1.0, 1 + piece.whole.numel()).view(piece.whole)
            assert torch.equal(piece.tensor, whole[place.index_in(whole_rect(piece.whole))])
            mine = flat.view(ranks, -1)[group.rank]
            assert piece.tensor.data_ptr() == mine[at:].data_ptr()  # a view: who moves it moves the weights
            covered[piece.name].append(place)
    assert tile(covered["a"], wholes["a"])
    assert tile(covered["c"], wholes["c"])
    for rect in rects:
        assert tile([common for place in covered["fused"] if (common := place.common(rect))], rect)


@pytest.mark.parametrize(
    ("holding", "copies", "shared"),
    [
        (4, 1, 1),  # whole replicas: each range is on one rank
        (4, 2, 1),  # two replicas, in which two stages have the same tied tensor: theirs add up, each keeps a range
        (2, 2, 2),  # two replicas, in which two tensor parts have the same norm: each pair keeps the same range
    ],
)
def test_ranks_that_have_the_same_range(holding: int, copies: int, shared: int):
    """A norm over all ranks divides by it. holding: ranks whose gradients of it add up; copies: in one replica."""
    group = in_process(holding)[0]
    slices = [Slice("a", torch.zeros(256), torch.Size([256]), (whole_rect((256,)),), group, copies)]
    (run,) = make_runs(slices, 1 << 20, in_parts=True)
    ((_, _, piece),) = shard_of(run, slices, run.empty(), replicas=4 if copies == 1 else 2)
    assert piece.copies == shared


# --- equal to all-reduce -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "name"), [(2, "adamw"), (2, "lars"), (3, "lamb"), (4, "sgd"), (4, "lamb")], ids=lambda value: str(value)
)
def test_weights_after_20_steps_are_those_of_allreduce(ranks: int, name: str):
    """1e-5 of each tensor's norm: fp32 sums in another order, over 20 steps. Three microbatches: where 8 rows are
    shared by three replicas, one of them has fewer. And every rank has its share of the state, no more.
    """
    common = {"optim": optim(name), "microbatches": 3}
    (whole, *_) = trained(ranks, **common)
    for stage in (1, 2):
        learners = trained(ranks, **common, sync=zero(stage))
        assert all(furthest(held(one), held(whole)) <= 1e-5 for one in learners)
        states = [one.state_bytes() for one in learners]
        assert sum(states) == whole.state_bytes()  # nothing is kept twice
        # Buckets are padded to 16 numbers a rank: in buckets of a thousand numbers that shows.
        assert max(states) <= whole.state_bytes() / ranks * 1.05


@STAGES
def test_what_else_moves_a_step(stage: int):
    """Rates by layer, frozen parameters, the guard (at a norm that is no spike: nothing is skipped), averages."""
    common = {
        "optim": optim("lamb", layer_decay=0.7, freeze=1),
        "guard": GuardOptions(policy="skip", spike_norm=50.0),
        "ema": 0.9,
    }
    whole, learner = trained(2, 8, **common)[0], trained(2, 8, **common, sync=zero(stage))[0]
    assert furthest(held(learner), held(whole)) <= 1e-5
    averages = {average.name: average for average in whole.ema.averages()}
    for piece in learner.ema.averages():
        (place,) = piece.places
        expected = averages[piece.name].tensor[place.index_in(whole_rect(piece.whole))]
        torch.testing.assert_close(piece.tensor, expected, rtol=1e-4, atol=1e-6)
    assert {average.name for average in averages.values()} >= {piece.name for piece in learner.ema.averages()}


@STAGES
@pytest.mark.parametrize("precision", ["bf16-weights", "fp16"])
def test_two_bytes(stage: int, precision: str):
    """Of few bits, and one or two microbatches, sums are exact: without clipping, the bits of all-reduce. What is
    gathered of bf16-weights are the bf16 weights, until a save makes the fp32 ones whole.
    """
    common = {"optim": optim(clip_norm=0.0), "precision": precision, "microbatches": 1}
    (whole, _), learners = trained(2, 6, **common), trained(2, 6, **common, sync=zero(stage))
    for learner in learners:
        assert_equal(held(learner), held(whole))
        assert_equal(
            {str(n): p for n, p in enumerate(learner.engine.replica.computing)},
            {str(n): p for n, p in enumerate(whole.engine.replica.computing)},
        )


def test_narrow_weights_are_whole_when_somebody_looks():
    def work(group: ThreadGroup) -> tuple[bool, bool]:
        learner = Learner(group, Recipe(precision="bf16-weights", sync=zero(1))).train(2)
        narrow = [held(learner)[piece.name] for piece in learner.engine.replica.slices]
        rounded = [torch.equal(t, t.bfloat16().float()) for t in narrow]
        learner.engine.check_replicas(2)  # it compares fp32
        return all(rounded), any(torch.equal(t, t.bfloat16().float()) for t in narrow if t.dim() == 2)

    for was_rounded, is_rounded in on_ranks(2, work):
        assert not was_rounded  # its own part never is
        assert not is_rounded


@STAGES
@pytest.mark.parametrize(("wire", "bound"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_gradients_of_two_bytes_are_rounded_once(stage: int, wire: str, bound: float):
    """SGD, one step: what the weights have moved is off by the rounding of the gradients, not more."""
    common = {"optim": optim("sgd", clip_norm=0.0, weight_decay=0.0, momentum=0.0)}
    start = held(trained(2, 0, **common)[0])
    whole, rounded = (held(trained(2, 1, **common, **sync)[0]) for sync in ({}, {"sync": zero(stage, wire)}))
    moved, expected = ({name: tensor[name] - start[name] for name in start} for tensor in (rounded, whole))
    found = {name: one for name, one in distances(moved, expected).items() if "qkv.bias" not in name}
    assert 0 < max(found.values()) <= 2 * bound


@STAGES
def test_what_nobody_used_stays_and_what_one_used_moves(stage: int):
    """Rank 0 uses a and b, rank 1 b and c; in the second pass alone. Nobody uses d: it does not decay either."""

    def work(group: ThreadGroup) -> list[list[float]]:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(40)) for name in "abcd"})
        mesh = whole_replicas(group)
        slices = whole_slices(model, group)
        sync = make_sync(zero(stage, bucket_mib=2e-4), slices, list(model.values()), mesh)
        optimizer = make_optimizer([piece.tensor for piece in sync.moves], optim("sgd", momentum=0.0), sync.norms)
        sync.begin(2)
        model["b"].sum().backward()
        (model["b"].sum() + 3 * model["ac"[group.rank]].sum()).backward()
        sync.finish(Told(torch.ones(()), [1, 1]))
        sync.step(Update(optimizer, 0.0, Guard(GuardOptions(), torch.device("cpu"))), lr=0.5)
        return [parameter.unique().tolist() for parameter in model.values()]

    # b: twice on two ranks; a, c: three times one; each divided by 4 targets, at a rate of a half
    assert on_ranks(2, work) == [[[0.625], [0.5], [0.625], [1.0]]] * 2


# --- gradients that are not kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_stage_2_keeps_a_share_and_three_buckets(ranks: int, wire: str):
    """Counted from what its buffers have lent at a time. Tensors of one size, so that buckets are alike."""
    count, size = 12, 256

    def work(group: ThreadGroup) -> tuple[int, int]:
        model = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(count))
        options = zero(2, wire, bucket_mib=2 * 4 * size / 2**20)
        slices = whole_slices(model, group)
        sync = make_sync(options, slices, list(model.parameters()), whole_replicas(group))
        for passes in (1, 3):
            sync.begin(passes)
            for _ in range(passes):
                x = torch.ones(1, 16)
                for layer in model:
                    x = layer(x)
                x.sum().backward()
            assert all(parameter.grad is None for parameter in model.parameters())
            sync.finish(Told(torch.ones(()), [1] * passes))
        planned = bytes_of(count * size, size, 8 * count * size, ranks, options.zero, microbatches=3)
        return sync._gradients.room.peak_bytes, planned.gradients

    scales = 0 if wire == "fp32" else 2 * 4 * ranks  # a word for each part, sent and received
    for peak, planned in on_ranks(ranks, work):
        assert peak == planned + scales == 4 * count * size / ranks + 3 * 2 * 4 * size + scales


@STAGES
def test_bytes_are_those_that_were_planned(stage: int):
    """Of 20 KiB in buckets of four; the padding is what differs."""
    learner = trained(2, 1, sync=zero(stage), precision="bf16-weights")[0]
    count = sum(piece.whole.numel() for piece in learner.engine.replica.slices)
    planned = bytes_of(count, 50 * 16, 8 * count, 2, learner.recipe.sync.zero, microbatches=2, narrow_weights=True)
    report = learner.sync.report()
    assert learner.sync._sent == pytest.approx(planned.sent, rel=0.02)
    assert report["sent_mib"] == round(learner.sync._sent / 2**20, 6)
    # Buckets are planned as full, which these are not, and of stage 1 as many under way as may be.
    peak = learner.sync._gradients.room.peak_bytes
    assert 0.6 * planned.gradients <= peak <= 1.05 * planned.gradients
    assert learner.state_bytes() == pytest.approx(planned.state, rel=0.02)


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_saved_on_any_number_of_ranks_and_resumed_on_another(tmp_path: Path):
    """4 ranks, 2, one, 2 without ZeRO, 3: what is loaded is what was saved, and the run is the unbroken one."""
    common = {"optim": optim("lamb"), "ema": 0.9}
    folder = None
    walk: Sequence[tuple[int, SyncOptions]] = [
        (4, zero(1)),
        (2, zero(2)),
        (1, zero(1)),
        (2, SyncOptions()),
        (3, zero(2)),
    ]
    for turn, (ranks, sync) in enumerate(walk):

        def work(group: ThreadGroup, turn: int = turn, sync: SyncOptions = sync, folder: Path | None = folder) -> Path:
            learner = Learner(group, Recipe(**common, sync=sync), folder)
            if folder is not None:
                again = learner.save(tmp_path / f"again-{turn}")
                group.barrier()
                assert_equal(tensors_in(again), tensors_in(folder))
            return learner.train(3).save(tmp_path / f"turn-{turn}")

        folder = on_ranks(ranks, work)[0]
    found = tensors_in(folder)
    unbroken = on_ranks(1, lambda group: Learner(group, Recipe(**common)).train(15).save(tmp_path / "unbroken"))[0]
    expected = tensors_in(unbroken)
    assert found.keys() == expected.keys()
    for kind in ("model.", "ema."):
        of_kind = [{name: t for name, t in one.items() if name.startswith(kind)} for one in (found, expected)]
        assert furthest(*of_kind) <= 1e-5
    assert all(found[name] == 15 for name in found if name.startswith("optimizer.step."))


# --- with a cut --------------------------------------------------------------------------------------------------


def assert_pieces_of(learners: Sequence[Learner], whole: Learner, bound: float) -> None:
    """Each rank's slices are those places of the model that was not cut."""
    for learner in learners:
        for piece in learner.engine.replica.slices:
            full = held(whole)[piece.name]
            expected = torch.cat([full[place.index_in(whole_rect(piece.whole))] for place in piece.places])
            distance = torch.linalg.norm(piece.tensor.detach() - expected) / torch.linalg.norm(expected)
            assert distance <= bound, piece.name


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"pipeline": 2}], ids=str)
def test_norms_of_cut_tensors_are_those_of_whole_ones(name: str, mesh: dict[str, int]):
    """On two replicas, with all-reduce and both stages of ZeRO; 2e-6: the cut's own rounding is in it."""
    common = {"optim": optim(name), "mesh": MeshOptions(**mesh)}
    (whole, _) = trained(2, optim=common["optim"])
    assert_pieces_of(trained(4, **common), whole, 2e-6)
    for stage in (1, 2) if "tensor" in mesh else (1,):
        assert_pieces_of(trained(4, **common, sync=zero(stage)), whole, 2e-6)


@pytest.mark.parametrize("sync", [SyncOptions(), zero(1)], ids=["allreduce", "zero"])
@pytest.mark.parametrize("mesh", [{}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_the_numbers_of_a_step_are_those_of_whole_replicas(sync: SyncOptions, mesh: dict[str, int]):
    """Loss, targets, norm, and the squares of the replicas' own gradients, counted once, whatever the cut."""
    common = {"model": {"tied": False}, "cut": CutOptions(sequence=False)}
    expected = on_ranks(2, lambda group: Learner(group, Recipe(**common)).step())[0]
    recipe = Recipe(**common, mesh=MeshOptions(**mesh), sync=sync)
    for found in on_ranks(4 if mesh else 2, lambda group: Learner(group, recipe).step()):
        for name in ("loss", "weight", "grad_norm", "part_square", "part_inverse", "whole_square"):
            assert getattr(found, name).item() == pytest.approx(getattr(expected, name).item(), rel=1e-5), name


def test_what_several_ranks_have_a_share_of_stays_out_of_the_noise_scale():
    """A tied embedding on both stages: each rank's part of its gradient says nothing; nor is it in the whole's."""
    mesh = MeshOptions(pipeline=2)
    tied = on_ranks(4, lambda group: Learner(group, Recipe(mesh=mesh)).step())
    whole = on_ranks(2, lambda group: Learner(group, Recipe()).step())[0]
    assert len({agreed.whole_square.item() for agreed in tied}) == 1
    assert tied[0].grad_norm.item() == pytest.approx(whole.grad_norm.item(), rel=1e-5)
    assert tied[0].whole_square.item() < 0.999 * whole.whole_square.item()
    assert tied[0].part_square.item() < 0.999 * whole.part_square.item()


def test_one_replica_is_noted_without_microbatches_there_is_no_noise():
    (agreed, _) = on_ranks(2, lambda group: Learner(group, Recipe(mesh=MeshOptions(tensor=2), microbatches=1)).step())
    assert agreed.part_square.isnan()
    (cut, _) = on_ranks(2, lambda group: Learner(group, Recipe(mesh=MeshOptions(tensor=2))).step())
    (whole,) = on_ranks(1, lambda group: Learner(group, Recipe()).step())
    assert cut.part_inverse.item() == whole.part_inverse.item()


# --- what it cannot do ---------------------------------------------------------------------------------------------


def test_one_replica_shares_with_nobody_and_says_so():
    learner = Learner(LocalGroup(), Recipe(sync=zero(2)))
    assert isinstance(learner.sync, AllReduceSync)
    assert learner.sync.notes == [
        "sync.name=zero: there is one replica, which shares its optimizer's state with nobody"
    ]
    assert Learner(LocalGroup(), Recipe(sync=SyncOptions(allreduce=AllReduceOptions()))).sync.notes == []


def test_fewer_parameters_than_shares():
    def work(group: ThreadGroup) -> None:
        layer = nn.Linear(4, 2)
        with pytest.raises(ConfigError, match="so few parameters are trained that rank 2 would have none of them"):
            make_sync(zero(1), whole_slices(layer, group), list(layer.parameters()), whole_replicas(group))

    on_ranks(4, work)
