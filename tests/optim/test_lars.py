"""LARS against a float64 reference written from the paper, and what LARS and LAMB share."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import stepping
import torch
from stepping import bits, rate_of, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.optim import runs
from hvdtrain.optim.lamb import Lamb
from hvdtrain.optim.lars import Lars, Layerwise, norms_of, trust_ratios, whole_norms

SHAPES = [(3, 5), (7,), (1, 1), (2, 3, 4), (600, 500)]  # the last alone is more than a run
STEPS = 5
BOTH = pytest.mark.parametrize("kind", [Lars, Lamb])


def weights_of(shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0) -> list[nn.Parameter]:
    """Of norms that differ by up to a million."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-3, 2, len(shapes)).tolist()
    return [
        nn.Parameter(torch.randn(shape, generator=generator) * size) for shape, size in zip(shapes, sizes, strict=True)
    ]


def gradients_of(weights: Sequence[Tensor], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(w.shape, generator=generator) * 3.0**number for number, w in enumerate(weights)]


def walk(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], steps: int = STEPS, first: int = 0) -> None:
    stepping.walk(optimizer, weights, gradients_of, steps, first)


def assert_near(weights: Sequence[Tensor], truth: Sequence[np.ndarray], start: Sequence[Tensor]) -> None:
    """Within 1e-5 of the way that a tensor went (fp32 norms, moments) and 3e-7 of its norm (it is rounded itself)."""
    for weight, true, first in zip(weights, truth, start, strict=True):
        error = np.linalg.norm(weight.detach().double().numpy() - true)
        way = np.linalg.norm(true - first.detach().double().numpy())
        assert way > 0
        assert error <= 1e-5 * way + 3e-7 * np.linalg.norm(true)


# --- the paper ---------------------------------------------------------------------------------------------------


def by_the_paper(
    start: Sequence[Tensor], momentum: float, decay: float, eta: float, clip: float, adapted: bool
) -> list[np.ndarray]:
    """Algorithm 1, a tensor at a time."""
    ends = []
    for number, first in enumerate(start):
        w = first.detach().double().numpy()
        v = np.zeros_like(w)
        for step in range(STEPS):
            g = gradients_of(start, step)[number].double().numpy()
            local = eta * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
            local = min(local, clip) if clip else local
            v = momentum * v + rate_of(step) * (local if adapted else 1.0) * (g + decay * w)
            w = w - v
        ends.append(w)
    return ends


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("adapted", [True, False])
def test_against_the_paper(momentum: float, decay: float, clip: float, adapted: bool):
    weights, eta = weights_of(), 0.2
    start = [w.detach().clone() for w in weights]
    groups = [{"params": weights, "is_adapted": adapted}]
    walk(Lars(groups, 0.0, momentum, decay, trust_coefficient=eta, trust_clip=clip), weights)
    assert_near(weights, by_the_paper(start, momentum, decay, eta, clip, adapted), start)


def test_the_clip_of_that_test_clips_some():
    start = weights_of()
    clipped, free = (by_the_paper(start, 0.9, 0.3, 0.2, clip, True) for clip in (0.05, 0.0))
    differs = [not np.array_equal(a, b) for a, b in zip(clipped, free, strict=True)]
    assert any(differs)
    assert not all(differs)


def test_one_step_by_hand():
    """|w| = 5, |g| = 10, decay 1: ratio 0.3 * 5 / (10 + 5) = 0.1; then w - 0.5 * 0.1 * (g + w)."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([10.0, 0.0])
    Lars([weight], lr=0.5, weight_decay=1.0, trust_coefficient=0.3).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([3 - 0.05 * 13, 4 - 0.05 * 4]))


def test_the_rate_is_inside_of_the_momentum():
    """At rate 0 a step goes on by what the last ones have left, as in the paper; torch's SGD would stand still."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([10.0, 0.0])
    optimizer = Lars([weight], lr=0.5, momentum=0.8)
    optimizer.step()
    moved = torch.tensor([3.0, 4.0]) - weight.detach()
    before = weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(before - weight.detach(), 0.8 * moved, rtol=1e-3, atol=0)


# --- trust ratios ------------------------------------------------------------------------------------------------


def test_ratios_by_hand():
    above, below = torch.tensor([6.0, 0.0, 6.0, 0.0]), torch.tensor([2.0, 2.0, 0.0, 0.0])
    assert trust_ratios(above, below, 0.0).tolist() == [3.0, 1.0, 1.0, 1.0]
    assert trust_ratios(above, below, 2.0).tolist() == [2.0, 1.0, 1.0, 1.0]


def test_norms_of_large_tensors_keep_their_digits():
    """torch's own norm adds up in one fp32 number for each lane on a CPU: 1e-4 too small for this one."""
    large = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1)) * 100
    small = torch.tensor([3.0, 4.0])
    norms = norms_of([large, small, torch.tensor(-2.0)])
    truth = torch.tensor([large.double().norm(), 5.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-6, atol=0)


@BOTH
def test_a_tensor_of_zeros_moves(kind: type[Layerwise]):
    """With the ratio of its norm, 0, it never would; it moves as one that is not adapted."""
    ends = []
    for adapted in (True, False):
        weight = nn.Parameter(torch.zeros(3, 4))
        weight.grad = torch.ones(3, 4)
        kind([{"params": [weight], "is_adapted": adapted}], lr=0.1, weight_decay=0.5).step()
        ends.append(weight.detach())
    assert ends[0].abs().min() > 0.01
    torch.testing.assert_close(ends[0], ends[1])


@BOTH
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_without_a_gradient_and_decay_nothing_moves(kind: type[Layerwise], value: float):
    weight = nn.Parameter(torch.full((3, 4), value))
    weight.grad = torch.zeros(3, 4)
    kind([weight], lr=0.1).step()
    assert torch.equal(weight.detach(), torch.full((3, 4), value))


@BOTH
def test_parameters_without_a_gradient_are_left_alone(kind: type[Layerwise]):
    weights = weights_of()
    optimizer = kind(weights, lr=0.1, weight_decay=0.5)
    before = [w.detach().clone() for w in weights]
    weights[1].grad = torch.ones_like(weights[1])
    optimizer.step()
    assert [torch.equal(w, b) for w, b in zip(weights, before, strict=True)] == [True, False, True, True, True]
    assert set(optimizer.state) == {weights[1]}


# --- together and one by one -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("run", [1, 1 << 10, 1 << 30])
def test_together_is_one_by_one(kind: type[Layerwise], run: int, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit, however the parameters are cut into runs."""
    monkeypatch.setattr(runs, "_CPU_RUN", run)
    together, alone = weights_of(), weights_of()
    optimizer = kind(together, lr=0.1, weight_decay=0.1)
    walk(optimizer, together)
    for number, weight in enumerate(alone):
        lonely = kind([weight], lr=0.1, weight_decay=0.1)
        for step in range(STEPS):
            weight.grad = gradients_of(alone, step)[number]
            lonely.param_groups[0]["lr"] = rate_of(step)
            lonely.step()
        assert same(bits(lonely, [weight]), bits(optimizer, [together[number]]))


def test_runs():
    optimizer = Lars(weights_of(), lr=0.1)
    (group,) = optimizer.param_groups
    assert list(optimizer._runs(group)) == []
    for weight in group["params"]:
        weight.grad = torch.ones_like(weight)
    sizes = [[w.numel() for w in run] for run, _ in optimizer._runs(group)]
    assert sizes == [[15, 7, 1, 24], [300_000]]


@BOTH
def test_nothing_waits_for_the_device(kind: type[Layerwise]):
    """A number that Python asks for (``.item()``, ``if tensor``) would make it wait for the GPU."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "_local_scalar_dense" not in str(func)
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    weights = weights_of()
    optimizer = kind(weights, lr=0.1, weight_decay=0.1, trust_clip=2.0)
    optimizer.found_inf = torch.zeros(())
    with Watch():
        walk(optimizer, weights)
    assert any("_fused" in name for name in seen)
    with pytest.raises(AssertionError), Watch():
        torch.ones(()).item()


# --- overflow, resume --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_overflow_leaves_everything_as_it_is(kind: type[Layerwise], steps_before: int):
    """To the bit, signs of zeros included; and the next step is what it would have been."""
    weights, untouched = weights_of(), weights_of()
    for some in (weights, untouched):
        some[0].data[0, :3] = torch.tensor([0.0, -0.0, 1e-45])
        some[1].data[:2] = torch.tensor([0.0, -0.0])

    def make(some: list[nn.Parameter]) -> Layerwise:
        groups = [{"params": some[:1] + some[2:]}, {"params": some[1:2], "is_adapted": False}]
        optimizer = kind(groups, lr=0.1, weight_decay=0.1)
        walk(optimizer, some, steps_before)
        return optimizer

    optimizer, other = make(weights), make(untouched)
    before = bits(optimizer, weights)
    optimizer.found_inf = torch.ones(())
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.inf)
        weight.grad.view(-1)[0] = torch.nan
    optimizer.step()
    if steps_before:
        assert same(bits(optimizer, weights), before)
    else:
        assert same(bits(optimizer, weights)[: len(weights)], before)
        assert all(not state.any() for state in bits(optimizer, weights)[len(weights) :])  # begun, and empty
    optimizer.found_inf = torch.zeros(())
    for optimizer_, some in ((optimizer, weights), (other, untouched)):
        walk(optimizer_, some, 2, first=steps_before)
    assert same(bits(optimizer, weights), bits(other, untouched))


@BOTH
def test_resume(kind: type[Layerwise]):
    unbroken, broken = weights_of(), weights_of()
    whole, first = (kind(some, lr=0.1, weight_decay=0.1) for some in (unbroken, broken))
    walk(whole, unbroken, 4)
    walk(first, broken, 2)
    resumed = [nn.Parameter(w.detach().clone()) for w in broken]
    second = kind(resumed, lr=7.0, weight_decay=7.0)
    second.load_state_dict(first.state_dict())
    assert same(bits(second, resumed), bits(first, broken))
    walk(second, resumed, 2, first=2)
    assert same(bits(second, resumed), bits(whole, unbroken))


# --- cut tensors -------------------------------------------------------------------------------------------------


class Pair:
    """Two ranks, as threads, that add up the squares of their halves."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=20)
        self.squares: list[Tensor | None] = [None, None]
        self.calls = [0, 0]

    def norms_of(self, rank: int) -> Callable[[list[Tensor], list[Tensor]], Tensor]:
        def norms(weights: list[Tensor], others: list[Tensor]) -> Tensor:
            self.calls[rank] += 1
            self.squares[rank] = whole_norms(weights, others).square()
            self.barrier.wait()
            found = (self.squares[0] + self.squares[1]).sqrt()
            self.barrier.wait()
            return found

        return norms


@BOTH
def test_a_cut_tensor_moves_as_the_whole(kind: type[Layerwise]):
    """Each rank has half of the rows. Norms are summed in another order: 1e-5. Norms of halves alone would be off."""
    shapes = [(4, 6), (600, 500), (2, 2)]
    whole = weights_of(shapes)
    walk(kind(whole, lr=0.1, weight_decay=0.1), whole)
    pair = Pair()
    halves = [[nn.Parameter(w.detach().chunk(2)[rank].clone()) for w in weights_of(shapes)] for rank in (0, 1)]

    def run(rank: int) -> None:
        optimizer = kind(halves[rank], lr=0.1, weight_decay=0.1, norms=pair.norms_of(rank))
        for step in range(STEPS):
            for number, weight in enumerate(halves[rank]):
                weight.grad = gradients_of(whole, step)[number].chunk(2)[rank].clone()
            optimizer.param_groups[0]["lr"] = rate_of(step)
            optimizer.step()

    ranks = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert not rank.is_alive()
    assert pair.calls == [STEPS, STEPS]  # one collective a step
    for number, weight in enumerate(whole):
        joined = torch.cat([half[number].detach() for half in halves])
        torch.testing.assert_close(joined, weight.detach(), rtol=1e-5, atol=1e-5 * weight.abs().mean().item())


@BOTH
def test_halves_that_do_not_ask_go_another_way(kind: type[Layerwise]):
    """Or the test above would hold without asking."""
    whole = weights_of([(4, 6)])
    half = [nn.Parameter(whole[0].detach().chunk(2)[0].clone())]
    for some, rows in ((whole, 4), (half, 2)):
        optimizer = kind(some, lr=100.0)
        some[0].grad = torch.arange(24.0).reshape(4, 6)[:rows].clone()
        optimizer.step()
    assert not torch.allclose(whole[0][:2], half[0], rtol=1e-4)


def test_other_types_are_our_own_mistake():
    with pytest.raises(AssertionError, match="fp32 weights"):
        Lars([nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))], lr=0.1)
    with pytest.raises(AssertionError):
        Lars([nn.Parameter(torch.ones(2, 3).T)], lr=0.1)
