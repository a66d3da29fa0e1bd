"""The loss that keeps no logits against torch's cross-entropy of all of them, in fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdtrain.models import losses
from hvdtrain.models.losses import LossTerms, chunk_rows, linear_cross_entropy, score_rows, score_rows_fused

IGNORE = -100


def inputs(targets: int, width: int, vocabulary: int, dtype=torch.float32, seed: int = 0, ignored: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(targets, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).to(dtype).requires_grad_()
    truth = torch.randint(0, vocabulary, (targets,), generator=generator)
    truth[torch.randperm(targets, generator=generator)[:ignored]] = IGNORE
    return hidden, weight, truth


def plain(hidden, weight, truth, terms: LossTerms) -> torch.Tensor:
    """The definition, by torch, in fp64."""
    logits = hidden.double() @ weight.double().T
    loss = F.cross_entropy(
        logits, truth, ignore_index=terms.ignore, reduction="sum", label_smoothing=terms.label_smoothing
    )
    log_z = logits.logsumexp(1)
    return loss + terms.z_loss * (log_z.square() * (truth != terms.ignore)).sum()


def gradients(loss: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, of)]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (torch.linalg.norm(a - b) / torch.linalg.norm(b).clamp(min=1e-30)).item()


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
@pytest.mark.parametrize(
    "terms", [LossTerms(), LossTerms(label_smoothing=0.1), LossTerms(z_loss=1e-2), LossTerms(0.2, 1e-3)], ids=str
)
def test_equals_the_definition(terms: LossTerms, rows: int):
    """fp32: loss and gradients within 1e-6, whatever the chunk."""
    hidden, weight, truth = inputs(50, 12, 37, ignored=9)
    loss, exact = linear_cross_entropy(hidden, weight, truth, terms, rows), plain(hidden, weight, truth, terms)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    for found, wanted in zip(gradients(loss, hidden, weight), gradients(exact, hidden, weight), strict=True):
        assert apart(found, wanted) < 1e-6


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(2, 50), st.integers(0, 40), st.integers(1, 45), st.floats(0, 0.9)
)
def test_any_shape(targets: int, width: int, vocabulary: int, ignored: int, rows: int, smoothing: float):
    hidden, weight, truth = inputs(targets, width, vocabulary, seed=targets, ignored=min(ignored, targets))
    terms = LossTerms(smoothing)
    loss, exact = linear_cross_entropy(hidden, weight, truth, terms, rows), plain(hidden, weight, truth, terms)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5, abs=1e-5)
    for found, wanted in zip(gradients(loss, hidden, weight), gradients(exact, hidden, weight), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [7, 1000])
def test_a_bias_is_added_to_the_logits(rows: int):
    """As a column of the weight would, whose hidden state is 1."""
    hidden, weight, truth = inputs(50, 12, 37, ignored=9)
    bias = torch.linspace(-1, 1, 37, requires_grad=True)
    terms = LossTerms(0.1, 1e-2)
    loss = linear_cross_entropy(hidden, weight, truth, terms, rows, bias)
    widened = torch.cat([hidden, torch.ones(50, 1)], 1), torch.cat([weight, bias[:, None]], 1)
    exact = plain(*widened, truth, terms)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    of = hidden, weight, bias
    for found, wanted in zip(gradients(loss, *of), gradients(exact, *of), strict=True):
        assert apart(found, wanted) < 1e-6
    alone = linear_cross_entropy(hidden.detach(), weight.detach(), truth, terms, rows, bias)
    assert apart(*gradients(alone, bias), wanted) < 1e-6


def test_nothing_counts():
    hidden, weight, truth = inputs(8, 4, 5, ignored=8)
    loss = linear_cross_entropy(hidden, weight, truth, LossTerms(0.1, 0.1))
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(loss, hidden, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_products(dtype):
    """Products in 16 bits, sums in fp32: the loss within the products' rounding, not that of a sum in 16 bits."""
    hidden, weight, truth = inputs(600, 64, 300, dtype)
    loss, exact = linear_cross_entropy(hidden, weight, truth, LossTerms()), plain(hidden, weight, truth, LossTerms())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    grads, wanted = gradients(loss, hidden, weight), gradients(exact, hidden, weight)
    assert all(apart(a, b) < 0.01 for a, b in zip(grads, wanted, strict=True))


def test_autocast_decides_the_type_of_the_products_and_gradients_stay_fp32():
    hidden, weight, truth = inputs(40, 16, 50)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, truth, LossTerms())
    rounded = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), truth, LossTerms())
    assert loss.item() == rounded.item()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (hidden, weight)))


def test_a_scaled_loss_has_scaled_gradients():
    hidden, weight, truth = inputs(20, 6, 11)
    once = gradients(linear_cross_entropy(hidden, weight, truth, LossTerms()), hidden, weight)
    scaled = gradients(linear_cross_entropy(hidden, weight, truth, LossTerms()) * 1024.0, hidden, weight)
    assert all(torch.equal(a * 1024, b) for a, b in zip(once, scaled, strict=True))


def test_without_gradients_only_the_loss():
    hidden, weight, truth = inputs(30, 6, 11)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, truth, LossTerms(), 8)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(plain(hidden, weight, truth, LossTerms()).item(), rel=1e-6)


def test_the_logits_are_not_kept():
    """What autograd holds between forward and backward is as large as the two gradients, not as the logits."""
    hidden, weight, truth = inputs(4096, 8, 2000)
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, truth, LossTerms())
    assert sum(kept) == hidden.numel() + weight.numel()


@pytest.mark.parametrize(
    ("device", "has_triton", "compiler", "score"),
    [
        ("cuda", True, "/usr/bin/gcc", score_rows_fused),
        ("cuda", True, None, score_rows),
        ("cuda", False, "/usr/bin/gcc", score_rows),
        ("cpu", True, "/usr/bin/gcc", score_rows),
    ],
)
def test_the_kernel_is_for_gpus_where_it_can_be_built(device, has_triton, compiler, score, monkeypatch):
    monkeypatch.setattr(losses.importlib.util, "find_spec", lambda name: object() if has_triton else None)
    monkeypatch.setattr(losses.shutil, "which", lambda name: compiler)
    assert losses._score_on.__wrapped__(device) is score


def test_the_kernel_scores_more_at_once_than_eager_torch():
    """Whole tiles of a product; at least some rows, however large the vocabulary is."""
    assert chunk_rows("cuda", 50304) == 1024
    assert chunk_rows("cuda", 50304, fused=True) == 10240
    assert chunk_rows("cuda", 1 << 22, fused=True) == chunk_rows("cpu", 1 << 22) == 256
