"""Muon against a float64 reference written from the papers, and against torch's own."""

import math
from collections.abc import Sequence

import pytest
import stepping
import torch
from in_halves import update_of
from stepping import bits, rate_of, same
from tiny import tiny_decoder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.models.depth import rate_shares
from hvdtrain.models.lora import LoraOptions, adapt
from hvdtrain.models.matrices import block_matrices
from hvdtrain.optim import muon, runs
from hvdtrain.optim.muon import Muon, NewtonSchulz, WholeMatrices, orthogonal
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer

# Rows and columns, and the rows of the matrices in it: square, wide, tall, three in one of which two are alike.
SHAPES = {(8, 8): [8], (4, 12): [4], (20, 6): [20], (16, 8): [8, 4, 4], (48, 40): [48]}
STEPS = 4


def weights_of(shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5) for shape in shapes]


def gradients_of(weights: Sequence[Tensor], step: int) -> list[Tensor]:
    """Of sizes that differ by a million: only directions count."""
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(w.shape, generator=generator) * 10.0 ** (2 * n - 4) for n, w in enumerate(weights)]


def make(
    weights: Sequence[nn.Parameter], dtype: torch.dtype = torch.float32, decay: float = 0.3, **options: object
) -> Muon:
    chosen = OptimOptions(name="muon", weight_decay=decay, muon=options)
    parts = {weight: SHAPES.get(tuple(weight.shape), [len(weight)]) for weight in weights}
    matrices = WholeMatrices(parts, NewtonSchulz(dtype, chosen.muon.scale))
    optimizer = make_optimizer(weights, chosen, matrices=matrices)
    assert isinstance(optimizer, Muon)
    return optimizer


def walk(optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], steps: int = STEPS, first: int = 0) -> None:
    stepping.walk(optimizer, weights, gradients_of, steps, first)


# --- the papers --------------------------------------------------------------------------------------------------


def by_the_papers(
    start: Sequence[Tensor], momentum: float, nesterov: bool, scale: str, decay: float = 0.3
) -> list[Tensor]:
    """A matrix at a time, in float64."""
    ends = []
    for number, first in enumerate(start):
        w = first.detach().double()
        m = torch.zeros_like(w)
        for step in range(STEPS):
            g = gradients_of(start, step)[number].double()
            m = momentum * m + (1 - momentum) * g
            u = momentum * m + (1 - momentum) * g if nesterov else m
            w = w - rate_of(step) * decay * w
            moved = []
            for x in u.split(SHAPES[tuple(w.shape)]):
                rows, columns = x.shape
                size = 0.2 * math.sqrt(max(rows, columns)) if scale == "rms" else math.sqrt(max(1, rows / columns))
                x = x / x.norm()
                for _ in range(5):
                    if rows <= columns:
                        a = x @ x.T
                        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
                    else:
                        a = x.T @ x
                        x = 3.4445 * x - 4.7750 * x @ a + 2.0315 * x @ a @ a
                moved.append(size * x)
            w = w - rate_of(step) * torch.cat(moved)
        ends.append(w)
    return ends


@pytest.mark.parametrize("momentum", [0.95, 0.0])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["rms", "original"])
def test_against_the_papers(momentum: float, nesterov: bool, scale: str):
    """Within 1e-4 of the way that a tensor went: the polynomial's slope at 0 is 3.4^5, which rounding grows by."""
    weights = weights_of()
    start = [w.detach().clone() for w in weights]
    walk(make(weights, momentum=momentum, nesterov=nesterov, scale=scale), weights)
    for weight, true, first in zip(weights, by_the_papers(start, momentum, nesterov, scale), start, strict=True):
        assert (weight.detach().double() - true).norm() <= 1e-4 * (true - first.double()).norm()


@pytest.mark.parametrize(("scale", "theirs"), [("rms", "match_rms_adamw"), ("original", "original")])
def test_torchs_own(scale: str, theirs: str):
    """Whose products are in bf16, as ours may be: each step is as near as that rounds."""
    shapes = [shape for shape, parts in SHAPES.items() if len(parts) == 1]
    ours, others = weights_of(shapes), weights_of(shapes)
    walk(make(ours, torch.bfloat16, scale=scale), ours)
    walk(torch.optim.Muon(others, weight_decay=0.3, adjust_lr_fn=theirs), others)
    for mine, other, first in zip(ours, others, weights_of(shapes), strict=True):
        assert (mine - other).norm() <= 0.03 * (other - first).norm()


def test_singular_values_become_about_1():
    """About 0.7 to 1.2 (Jordan et al. 2024), where they were not below a thousandth of the largest; in bf16 too."""
    for shape in ((6, 6), (4, 40), (40, 4)):
        drawn = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
        for dtype in (torch.float32, torch.bfloat16):
            found = torch.linalg.svdvals(orthogonal(drawn, 1.0, dtype).float())
            assert found.min() > 0.6
            assert found.max() < 1.25


def test_an_update_is_as_large_as_adamws():
    """rms: 0.2 in the mean square, which AdamW's are in training (Liu et al. 2025, 2.2)."""
    for rows, columns in ((64, 64), (16, 128), (128, 16)):
        drawn = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(1))
        scale = NewtonSchulz().scale_of((rows, columns))
        assert orthogonal(drawn, scale, torch.float32).square().mean().sqrt() == pytest.approx(0.2, rel=0.2)


def test_parts_of_a_tensor_move_as_matrices_of_their_own():
    (fused,) = weights_of([(16, 8)])
    apart = [nn.Parameter(part.clone()) for part in fused.detach().split([8, 4, 4])]
    of_fused, of_apart = make([fused]), make(apart)
    for step in range(2):
        (fused.grad,) = gradients_of([fused], step)
        for weight, part in zip(apart, fused.grad.split([8, 4, 4]), strict=True):
            weight.grad = part.clone()
        of_fused.step()
        of_apart.step()
    torch.testing.assert_close(torch.cat([part.detach() for part in apart]), fused.detach(), rtol=1e-5, atol=1e-6)


def test_a_gradient_of_zeros_moves_nothing():
    (weight,) = weights_of([(8, 8)])
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    make([weight], decay=0.0).step()
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("together", [1, 1 << 30])
def test_runs_and_batches_change_nothing_but_rounding(together: int, monkeypatch: pytest.MonkeyPatch):
    expected = weights_of()
    walk(make(expected), expected)
    monkeypatch.setattr(muon, "_CPU_TOGETHER", together)
    monkeypatch.setattr(runs, "_CPU_RUN", together)
    weights = weights_of()
    walk(make(weights), weights)
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-4, atol=1e-5)


# --- which are matrices of blocks --------------------------------------------------------------------------------


def of_model(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    chosen = OptimOptions(name="muon", **options)
    parts = {named[name]: rows for name, rows in block_matrices(named, model.options).items()}
    shares = rate_shares(list(named), chosen.layer_decay)
    matrices = WholeMatrices(parts, NewtonSchulz())
    return make_optimizer(named.values(), chosen, shares=[shares[name] for name in named], matrices=matrices)


@pytest.mark.parametrize("shape", [{}, {"activation": "swiglu", "kv_heads": 1, "tied": False}])
def test_which_they_are(shape: dict):
    model = tiny_decoder(**shape)
    parts = block_matrices(dict(model.named_parameters()), model.options)
    linear = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in name}
    assert set(parts) == linear
    width, kv = model.options.width, model.options.width // 4 if shape else model.options.width
    hidden = model.options.hidden_width
    assert parts["blocks.0.attention.qkv.weight"] == [width, kv, kv] if not shape else parts
    assert parts["blocks.0.feed_forward.up.weight"] == ([hidden, hidden] if shape else [hidden])
    for name, rows in parts.items():
        assert sum(rows) == len(model.get_parameter(name))


def test_each_goes_its_own_way():
    """Embeddings decay and go at AdamW's rate; vectors do not decay; layers share rates as they do elsewhere."""
    model = tiny_decoder()
    optimizer = of_model(model, lr=0.02, adamw_lr=0.005, weight_decay=0.3, layer_decay=0.5)
    found = {
        id(p): (g["is_orthogonal"], g["weight_decay"], g["lr_share"])
        for g in optimizer.param_groups
        for p in g["params"]
    }
    names = [name for name, _ in model.named_parameters()]
    shares = rate_shares(names, 0.5)
    for name, parameter in model.named_parameters():
        is_orthogonal = "blocks" in name and name.endswith("weight") and "norm" not in name
        decay = 0.0 if parameter.dim() < 2 else 0.3
        assert found[id(parameter)] == (is_orthogonal, decay, shares[name] * (1 if is_orthogonal else 0.25)), name


def test_the_rest_moves_as_adamw_moves_it():
    """To the bit, with its own rate."""
    model, other = tiny_decoder(), tiny_decoder()
    ours = of_model(model, lr=0.02, adamw_lr=0.01, beta1=0.8, eps=1e-6, weight_decay=0.3)
    theirs = make_optimizer(other.parameters(), OptimOptions(beta1=0.8, eps=1e-6, weight_decay=0.3))
    for some, optimizer, rate in ((model, ours, 0.02), (other, theirs, 0.01)):
        update = update_of(optimizer)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in some.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            update.apply(rate)
    in_blocks = block_matrices(dict(model.named_parameters()), model.options)
    for (name, mine), true in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, true) == (name not in in_blocks), name


def test_without_a_rate_of_its_own_the_rest_has_that_of_the_matrices():
    assert {group["lr_share"] for group in of_model(tiny_decoder()).param_groups} == {1.0}


def test_what_is_frozen_stays_out_and_adapters_are_adamws():
    model = tiny_decoder()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapt(model, model.options, LoraOptions())
    optimizer = of_model(model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        ".lora." in name for name, _ in model.named_parameters()
    )
    assert not any(group["is_orthogonal"] for group in optimizer.param_groups)


# --- overflow, the device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_before", [0, 2])
def test_an_overflow_leaves_everything_as_it_is(steps_before: int):
    """To the bit; and the next step is what it would have been."""
    weights, untouched = weights_of(), weights_of()
    optimizer, other = make(weights), make(untouched)
    walk(optimizer, weights, steps_before)
    walk(other, untouched, steps_before)
    before = bits(optimizer, weights)
    optimizer.found_inf = torch.ones(())
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.inf)
        weight.grad.view(-1)[0] = torch.nan
    optimizer.step()
    after = bits(optimizer, weights)
    assert same(after[: len(before)] if steps_before else after[: len(weights)], before[: len(after)])
    assert steps_before or all(not state.any() for state in after[len(weights) :])  # begun, and empty
    optimizer.found_inf = torch.zeros(())
    walk(optimizer, weights, 2, first=steps_before)
    walk(other, untouched, 2, first=steps_before)
    assert same(bits(optimizer, weights), bits(other, untouched))


WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # what is done next hangs on numbers


def test_nothing_waits_for_the_device():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not WAITING.intersection(func.tags), func
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    weights = weights_of()
    optimizer = make(weights)
    optimizer.found_inf = torch.zeros(())
    with Watch():
        walk(optimizer, weights)
    assert any("_fused" in name for name in seen)


def test_a_gpu_makes_all_matrices_of_a_shape_at_once():
    """Three products a step, in bf16, however many matrices there are; told by a device that has no numbers."""

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "bmm" in str(func):
                products.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    products: list[torch.dtype] = []
    weights = [torch.empty(512, 256, device="meta") for _ in range(6)]
    matrices = WholeMatrices({weight: [256, 256] for weight in weights}, NewtonSchulz(torch.bfloat16))
    with Count():
        moved = [run for run, _ in matrices.updates(weights, lambda run, into: torch._foreach_copy_(into, run))]
    assert moved == [weights]
    assert products == [torch.bfloat16] * 3 * muon.STEPS


def test_a_rate_that_is_a_tensor():
    """As the guard gives it."""
    weights, others = weights_of(), weights_of()
    for some, rate in ((weights, torch.tensor(0.25)), (others, 0.25)):
        optimizer = make(some)
        for weight, gradient in zip(some, gradients_of(some, 0), strict=True):
            weight.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert same(weights, others)
