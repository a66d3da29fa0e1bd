"""Compressed gradients: what they are, what is left for later, and that it says nothing of ranks."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from learner import Learner, Recipe, furthest, held
from threads import ThreadGroup, on_ranks
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torchs

from hvdtrain.comm.group import Group
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.options import TransformerOptions
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.loss_scale import LossScale
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.optim.update import Update
from hvdtrain.slices import whole_slices
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.sync.powersgd import PowerSgdOptions, is_factored, numbers_sent
from hvdtrain.sync.sign import SignOptions, _opened
from hvdtrain.sync.sync import Sync, Told
from hvdtrain.sync.topk import TopkOptions

CPU = torch.device("cpu")
POWERSGD = SyncOptions(name="powersgd", powersgd=PowerSgdOptions(rank=2))
SIGN = SyncOptions(name="sign")
TOPK = SyncOptions(name="topk", topk=TopkOptions(share=0.05))
ALL = pytest.mark.parametrize("options", [POWERSGD, SIGN, TOPK], ids=lambda options: options.name)


def optim_for(options: SyncOptions) -> OptimOptions:
    if options.name == "sign":
        return OptimOptions(name="sgd", momentum=0.0, lr=3e-3, clip_norm=0.0)
    return OptimOptions(lr=0.01, eps=1e-6)


def recipe(options: SyncOptions, **more: object) -> Recipe:
    return Recipe(sync=options, optim=optim_for(options), **more)


def trained(ranks: int, steps: int, options: SyncOptions, **more: object) -> list[Learner]:
    """Each rank's learner, after its steps; the replicas were found equal, bit by bit."""

    def work(group: ThreadGroup) -> Learner:
        learner = Learner(group, recipe(options, **more)).train(steps)
        learner.engine.check_replicas(steps)
        return learner

    return on_ranks(ranks, work)


class ByHand:
    """Gradients that a test gives, one step after another, to plain SGD of rate 1: a step moves by the mean."""

    def __init__(self, group: Group, options: SyncOptions, *shapes: tuple[int, ...], scaled: bool = False, skip=False):
        self.parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        model = nn.ParameterList(self.parameters)
        slices = whole_slices(model, group)
        self.sync: Sync = make_sync(options, slices, self.parameters, whole_replicas(group))
        optimizer = torch.optim.SGD(self.parameters, lr=1.0, fused=True)
        guard = Guard(GuardOptions(policy="skip" if skip else "stop"), CPU)
        self.scale = LossScale(CPU) if scaled else None
        self.update = Update(optimizer, 0.0, guard, self.scale)

    def step(self, *sums: torch.Tensor | None, weight: int = 1) -> list[torch.Tensor]:
        """sums: this rank's gradients over its ``weight`` targets; None: not used. Returns what the weights moved."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        scale = None if self.scale is None else self.scale.scale.clone()
        self.sync.begin(1)
        used = [(p * g).sum() for p, g in zip(self.parameters, sums, strict=True) if g is not None]
        if used:
            (sum(used) * (1 if scale is None else scale)).backward()
        self.sync.finish(Told(torch.zeros(()), [weight], loss_scale=scale))
        self.agreed = self.sync.step(self.update, 1.0)
        return [old - new.detach() for old, new in zip(before, self.parameters, strict=True)]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- all of them ---------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-weights", "fp16"])
def test_replicas_stay_equal_in_every_precision(options: SyncOptions, precision: str):
    """Of uneven ranks, with accumulation and frozen layers; and the weights have moved."""
    learner, *_ = trained(3, 4, options, precision=precision)
    start = held(trained(3, 0, options)[0])
    moved = [name for name, weight in held(learner).items() if not torch.equal(weight, start[name])]
    assert len(moved) == len(start) or (options is TOPK and len(moved) > 10)  # small gradients wait
    assert all(weight.isfinite().all() for weight in held(learner).values())


@ALL
def test_frozen_parameters_stay_out(options: SyncOptions):
    def work(group: ThreadGroup) -> tuple[list[str], list[str]]:
        frozen = optim_for(options).model_copy(update={"freeze": 1})
        learner = Learner(group, Recipe(sync=options, optim=frozen))
        start = {name: weight.clone() for name, weight in held(learner).items()}
        learner.train(2)
        moved = [name for name, weight in held(learner).items() if not torch.equal(weight, start[name])]
        return moved, [piece.name for piece in learner.sync.moves]

    for moved, trained_names in on_ranks(2, work):
        assert moved == trained_names if options is not TOPK else moved and set(moved) < set(trained_names)
        assert not any(name.startswith(("embedding", "blocks.0")) for name in moved)


@ALL
def test_a_resumed_run_is_the_unbroken_one(options: SyncOptions, tmp_path: Path):
    """A save makes one state of the ranks' own, whether or not the run goes on; what is saved is alike on all.

    After an odd number of steps: signs go by turns.
    """

    def work(group: ThreadGroup) -> tuple[dict, dict]:
        unbroken = Learner(group, recipe(options)).train(3)
        folder = unbroken.save(tmp_path)
        group.agree([piece.tensor.tolist() for piece in unbroken.sync.state()], "what is kept")
        resumed = Learner(group, recipe(options), folder).train(3)
        return held(unbroken.train(3)), held(resumed)

    for unbroken, resumed in on_ranks(2, work):
        assert all(torch.equal(unbroken[name], weight) for name, weight in resumed.items())


@ALL
@pytest.mark.parametrize("scaled", [True, False])
def test_a_step_that_is_left_out_leaves_nothing_behind(options: SyncOptions, scaled: bool):
    """One rank's gradient is no number, in the third of five steps; or was never there at all."""

    def run(group: ThreadGroup, bad: float | None) -> list[torch.Tensor]:
        hand = ByHand(group, options, (20, 12), (5,), scaled=scaled, skip=not scaled)
        for step in range(5):
            sums = [noise(10 * step + group.rank, 20, 12), noise(step, 5)]
            if step == 2:
                if bad is None:
                    if options.name == "sign":
                        hand.sync._turn += 1  # votes are by turns: a step that is left out has had its own
                    continue
                if group.rank == 1:
                    sums[0][3, 3] = bad
            moved = hand.step(*sums)
            assert (step == 2) == all(not one.any() for one in moved)
        return [parameter.detach().clone() for parameter in hand.parameters]

    def work(group: ThreadGroup) -> None:
        expected = run(group, None)
        for bad in (math.nan, math.inf):
            for found, one in zip(run(group, bad), expected, strict=True):
                torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-6)  # of a scale that was halved

    on_ranks(2, work)


@ALL
def test_the_loss_scale_changes_nothing(options: SyncOptions):
    """Doubled on the way: what is kept is in units of the mean gradient."""

    def work(group: ThreadGroup) -> tuple[list[torch.Tensor], ...]:
        plain, scaled = (ByHand(group, options, (20, 12), (5,), scaled=scaled) for scaled in (False, True))
        for step in range(4):
            if step == 2:
                scaled.scale.scale.mul_(2)
            sums = noise(step + 10 * group.rank, 20, 12), noise(step, 5)
            plain.step(*sums, weight=3)
            scaled.step(*sums, weight=3)
        return plain.parameters, scaled.parameters

    for plain, scaled in on_ranks(2, work):
        for one, other in zip(plain, scaled, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@ALL
def test_what_nobody_used_stays_and_its_memory_too(options: SyncOptions):
    def work(group: ThreadGroup) -> None:
        hand = ByHand(group, options, (20, 12), (30, 10))
        a, b = noise(group.rank, 20, 12), noise(9 + group.rank, 30, 10)
        hand.step(a, b)
        before = [piece.tensor.clone() for piece in hand.sync.state() if piece.name.endswith(".1")]
        _, moved = hand.step(a, None)
        assert not moved.any() and hand.parameters[1].grad is None
        after = [piece.tensor for piece in hand.sync.state() if piece.name.endswith(".1")]
        assert before and all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        _, moved = hand.step(a, 9 * b if group.rank else None)  # one of them used it
        assert moved.any()

    on_ranks(2, work)


@pytest.mark.parametrize("options", [POWERSGD, TOPK], ids=lambda options: options.name)
def test_what_is_not_sent_comes_later(options: SyncOptions):
    """All that was moved, and the mean of what is left, is all that there was: nothing is lost."""

    def work(group: ThreadGroup) -> None:
        hand = ByHand(group, options, (20, 12))
        moved, total = torch.zeros(20, 12), torch.zeros(20, 12)
        for step in range(5):
            everyone = [noise(step + 10 * rank, 20, 12) * (rank + 1) for rank in range(group.size)]
            moved += hand.step(everyone[group.rank], weight=group.rank + 1)[0]
            total += sum(everyone) / sum(range(1, group.size + 1))
        hand.sync.settle(hand.update)
        (rest,) = [piece.tensor for piece in hand.sync.state() if piece.name.startswith("sync.residual.")]
        assert rest.norm() > 0.1 * total.norm()
        torch.testing.assert_close(moved + rest, total, rtol=1e-4, atol=1e-5)
        assert hand.sync.report()["residual_norm"] == pytest.approx(rest.norm().item(), rel=1e-5)

    on_ranks(3, work)


# --- PowerSGD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (4, 2)])
def test_powersgd_of_ranks_is_that_of_one_process(ranks: int, rank: int):
    """Linear in the sum: after 20 steps of AdamW the weights are one process's. ranks of processes, rank of matrices"""
    options = SyncOptions(name="powersgd", powersgd=PowerSgdOptions(rank=rank))
    (alone,) = trained(1, 20, options)
    learner, *_ = trained(ranks, 20, options)
    assert furthest(held(learner), held(alone)) <= 1e-4
    assert furthest(held(alone), held(trained(1, 20, SyncOptions())[0])) > 1e-2  # which is not all-reduce


def test_powersgd_resumes_on_another_number_of_ranks(tmp_path: Path):
    (folder,) = set(on_ranks(4, lambda group: Learner(group, recipe(POWERSGD)).train(5).save(tmp_path)))
    alone, others = (
        on_ranks(ranks, lambda group: held(Learner(group, recipe(POWERSGD), folder).train(10)))[0] for ranks in (1, 3)
    )
    assert furthest(others, alone) <= 1e-4


def test_powersgd_is_torchs(monkeypatch: pytest.MonkeyPatch):
    """torch's hook, of a bucket that is none, beside ours: ten steps of one process, of the same random basis."""
    shapes, store = [(20, 12), (5,), (16, 30)], dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        state = torchs.PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        state.iter = 2
        hand = ByHand(LocalGroup(), POWERSGD, *shapes)
        bases = {piece.name: piece.tensor for piece in hand.sync.state() if ".rank2." in piece.name}
        for step in range(10):
            sums = [noise(step + 10 * number, *shape) for number, shape in enumerate(shapes)]
            flat = torch.cat([one.flatten() for one in sums])
            views = [part.view(s) for part, s in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]
            bucket = SimpleNamespace(
                buffer=lambda f=flat: f, index=lambda: 0, gradients=lambda v=views: v, is_last=lambda: True
            )
            if step == 0:  # its first bases are drawn from its own seed: ours takes them over
                drawn = torch.Generator().manual_seed(state.rng.__class__(0).randint(1_000_000_000))
                for number in (0, 2):
                    m = shapes[number][1]
                    bases[f"sync.powersgd.rank2.{number}"].copy_(torch.randn(m, 2, generator=drawn))
            torchs.powerSGD_hook(state, bucket).wait()
            for found, expected in zip(hand.step(*sums), views, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [1, 2])
def test_a_gradient_of_low_rank_arrives_whole(rank: int):
    """In one step, which finds its columns' space, and nothing is left."""

    def work(group: ThreadGroup) -> None:
        hand = ByHand(group, SyncOptions(name="powersgd", powersgd=PowerSgdOptions(rank=rank)), (20, 12))
        gradient = noise(0, 20, rank) @ noise(1, rank, 12)
        (moved,) = hand.step(gradient * (group.rank + 1) / 3)
        torch.testing.assert_close(moved, gradient / 2, rtol=1e-4, atol=1e-4)
        assert hand.sync.report()["residual_norm"] < 1e-4

    on_ranks(2, work)


def test_only_matrices_that_become_half_as_large_are_factored():
    assert is_factored((20, 12), 2) and not is_factored((20, 12), 4)
    assert is_factored((16, 4, 3, 3), 2)  # as a matrix [16, 36]
    assert not is_factored((8, 8), 2) and is_factored((9, 9), 2)
    assert not is_factored((10_000,), 1)


def test_powersgd_of_rank_4_sends_a_ninetieth_of_30_million_numbers_and_of_rank_1_a_third_of_that():
    with torch.device("meta"):
        model = Decoder(TransformerOptions(layers=8, heads=8, width=512, context=256, ff_ratio=4.0, bias=False), 8192)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    total = sum(map(math.prod, shapes))
    assert 29e6 < total < 31e6
    assert numbers_sent(shapes, 4) <= total / 90
    assert numbers_sent(shapes, 1) <= total / 300


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        # 20 x 12 and 5 numbers at 4 ranks: (64 + 5) in fp32, once round and once more
        (POWERSGD, 2 * 3 / 4 * 4 * ((20 + 12) * 2 + 5)),
        (TOPK, 3 * 8 * math.ceil(0.05 * 245)),  # 13 values and places, to three others
        (SIGN, (3 / 4 * 4 + 3 * 1) * 4 * math.ceil(245 / 128)),  # 2 words a part: four parts, then its own to three
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_bytes_are_counted_as_they_leave(options: SyncOptions, sent: float):
    def work(group: ThreadGroup) -> tuple[float, set[str]]:
        hand = ByHand(group, options, (20, 12), (5,))
        hand.step(noise(0, 20, 12), noise(1, 5))
        assert not group.under_way
        return hand.sync.report()["sent_mib"] * 2**20, set(group.sent)

    for found, names in on_ranks(4, work):
        assert found == pytest.approx(sent, abs=1)
        assert len(names - {"hvdtrain.sums"}) == (1 if options is TOPK else 2)


# --- top-k ---------------------------------------------------------------------------------------------------------


def test_topk_sums_what_each_rank_finds_largest():
    def work(group: ThreadGroup) -> list[list[float]]:
        hand = ByHand(group, SyncOptions(name="topk", topk=TopkOptions(share=0.5)), (4,))
        mine = torch.tensor([[1.0, -8.0, 4.0, 0.0], [2.0, -6.0, 0.0, 3.0]][group.rank])
        return [hand.step(mine)[0].tolist() for _ in range(2)]

    # Second step: 1 + 1 and 2 + 2 are kept back again; of rank 1 the 4 is larger than its 3.
    assert on_ranks(2, work) == [[[0.0, -7.0, 2.0, 1.5], [2.0, -7.0, 2.0, 0.0]]] * 2


def test_what_waits_of_a_parameter_that_nobody_used_takes_no_place():
    """Larger than any number of the other one, of which all would have to wait."""
    hand = ByHand(LocalGroup(), SyncOptions(name="topk", topk=TopkOptions(share=0.5)), (4,), (4,))
    large, waits, small = torch.tensor([[10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0], [0.1, 0.2, 0.3, 0.4]])
    assert [moved.tolist() for moved in hand.step(large, waits)] == [large.tolist(), [0.0] * 4]
    assert torch.allclose(hand.step(small, None)[0], small, atol=1e-5)
    assert hand.step(0 * small, 0 * waits)[1].tolist() == waits.tolist()


# --- Signum --------------------------------------------------------------------------------------------------------


def test_bits_are_opened_in_their_order():
    words = torch.tensor([[1 << 5, -1, 0, -(1 << 31)]], dtype=torch.int32)
    bits = _opened(words)
    assert bits.shape == (1, 32, 4) and bits.dtype == torch.uint8
    assert [bits[0, :, word].nonzero().flatten().tolist() for word in range(4)] == [[5], list(range(32)), [], [31]]


def targets_of(rank: int, step: int) -> int:
    """Of a rank, in a step: not as many as in another one."""
    return 1 + (3 * rank + 7 * step) % 10


def signs_by_plain_torch(ranks: int, steps: int, momentum: float) -> list[torch.Tensor]:
    """What Bernstein et al. write, without bits; where no majority is, 0."""
    momenta, moves = [torch.zeros(37) for _ in range(ranks)], []
    for step in range(steps):
        for rank in range(ranks):
            mean = noise(step + 10 * rank, 37) / targets_of(rank, step)
            momenta[rank] = momentum * momenta[rank] + (1 - momentum) * mean
        moves.append(sum(one.sign() for one in momenta).sign())
    return moves


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_sign_is_the_majority_of_momenta(ranks: int):
    """Each rank's of the mean of its own targets. Ties go one way or the other, half of them each."""
    expected = signs_by_plain_torch(ranks, 6, 0.9)

    def work(group: ThreadGroup) -> list[torch.Tensor]:
        hand = ByHand(group, SIGN, (37,))
        return [
            hand.step(noise(step + 10 * group.rank, 37), weight=targets_of(group.rank, step))[0] for step in range(6)
        ]

    for moves in on_ranks(ranks, work):
        ties = 0.0
        for found, one in zip(moves, expected, strict=True):
            found = found.round(decimals=4)
            assert found.abs().eq(1).all()
            assert torch.equal(found[one != 0], one[one != 0])
            ties += float(found[one == 0].sum())
        assert abs(ties) <= 30 and (ranks == 4) == any(bool((one == 0).any()) for one in expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_has_no_gradient_goes_nowhere_in_two_steps(ranks: int):
    """A word that no batch has: its momentum is 0 on all ranks, and a bit knows no 0."""

    def work(group: ThreadGroup) -> torch.Tensor:
        hand = ByHand(group, SIGN, (200,))
        for _ in range(2):
            hand.step(torch.zeros(200))
        return hand.parameters[0].detach()

    for weights in on_ranks(ranks, work):
        assert weights.abs().max() < 1e-5


@pytest.mark.parametrize("way", [1.0, -1.0])
def test_ranks_that_know_nothing_leave_it_to_those_that_do(way: float):
    """Two of four have a gradient. The zeros of the others go up on one rank and down on the other."""

    def work(group: ThreadGroup) -> torch.Tensor:
        hand = ByHand(group, SIGN, (70,))
        return hand.step(torch.full((70,), way if group.rank < 2 else 0.0))[0]

    for moved in on_ranks(4, work):
        assert moved.tolist() == [way] * 70


def test_the_norm_of_signs_is_that_of_the_ranks_gradients():
    def work(group: ThreadGroup) -> float:
        hand = ByHand(group, SIGN, (4,), scaled=True)
        hand.step(torch.full((4,), [3.0, 4.0][group.rank]) * 2, weight=2)
        return float(hand.agreed.grad_norm)

    assert on_ranks(2, work) == [pytest.approx(math.sqrt((36 + 64) / 2))] * 2


def test_another_momentum_is_another_run():
    fast = SyncOptions(name="sign", sign=SignOptions(momentum=0.0))
    assert furthest(held(trained(2, 4, fast)[0]), held(trained(2, 4, SIGN)[0])) > 1e-3
