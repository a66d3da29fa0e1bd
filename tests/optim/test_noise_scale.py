"""The estimator on gradients whose noise is known."""

import math

import pytest
import torch

from hvdtrain.commands.report import advice
from hvdtrain.optim.noise_scale import NoiseScale


def _measured(noise: float, small: int, large: int, steps: int, size: int = 200) -> NoiseScale:
    """Gradients of |G|^2 = 4 and tr(S) = 4 ``noise``, as means over targets drawn one by one."""
    generator = torch.Generator().manual_seed(5)
    truth = torch.full((size,), 2 / math.sqrt(size), dtype=torch.float64)
    spread = 2 * math.sqrt(noise / size)
    found = NoiseScale(torch.device("cpu"))
    for _ in range(steps):
        parts = large // small
        means = truth + torch.randn(parts, size, generator=generator, dtype=torch.float64) * spread / math.sqrt(small)
        found.update(
            means.square().sum(1).mean(),
            torch.tensor(1 / small, dtype=torch.float64),
            means.mean(0).square().sum(),
            torch.tensor(float(large), dtype=torch.float64),
        )
    return found


@pytest.mark.parametrize(("small", "large"), [(4, 8), (2, 64), (16, 32)])
def test_it_is_what_the_gradients_were_drawn_with(small: int, large: int):
    for noise in (3.0, 50.0):
        assert _measured(noise, small, large, 600).value() == pytest.approx(noise, rel=0.2)


def test_unequal_parts():
    """Three ranks with 1, 2 and 5 targets: the mean of 1 / b counts, not 1 / the mean of b."""
    squares = [1.0 + 10.0 / b for b in (1, 2, 5)]
    found = NoiseScale(torch.device("cpu"))
    inverse = sum(1 / b for b in (1, 2, 5)) / 3
    found.update(*(torch.tensor(x, dtype=torch.float64) for x in (sum(squares) / 3, inverse, 1.0 + 10.0 / 8, 8.0)))
    assert found.value() == pytest.approx(10.0)


def test_a_step_without_an_answer_is_left_out():
    found = _measured(3.0, 4, 8, 5)
    before = found.state()
    nan, one = torch.tensor(math.nan, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    found.update(nan, nan, one, one)  # one part: nothing to compare
    found.update(one, one, torch.tensor(math.inf, dtype=torch.float64), one * 2)
    assert found.state() == before


def test_no_value_without_a_measurement_or_without_a_gradient():
    found = NoiseScale(torch.device("cpu"))
    assert found.value() is None
    assert found.state() is None
    assert "takes two replicas or two microbatches" in found.why_not()
    found.load((5.0, -1.0))
    assert found.value() is None
    assert "the noise hides the gradient" in found.why_not()
    found.load((5.0, 2.0))
    assert found.value() == 2.5
    assert found.why_not() == ""
    assert found.state() == (5.0, 2.0)


def test_the_advice_is_the_papers_arithmetic():
    assert advice(40_000, 10_000, 4) == (
        "critical batch about 40,000 tokens; at 10,000 tokens an update the run needs 25 % more tokens than at a small "
        "one; beyond 16 ranks with as much each, more of the allocation is wasted than gained"
    )
    assert "needs 11.0 times the tokens of a small one; beyond 1 rank with as much" in advice(1_000, 10_000, 2)
    assert "about 120 tokens" in advice(123.4, 10, 1)
