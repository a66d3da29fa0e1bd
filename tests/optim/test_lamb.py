"""LAMB against a float64 reference written from the paper, and AdamW where a tensor is not adapted."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from stepping import bits, rate_of, same
from test_lars import STEPS, assert_near, gradients_of, walk, weights_of
from torch import Tensor, nn

from hvdtrain.optim.lamb import Lamb, Moments

BETAS, EPS = (0.8, 0.95), 1e-3  # an eps that is felt


def by_the_paper(
    start: Sequence[Tensor], decay: float, corrected: bool, clip: float, adapted: bool
) -> tuple[list[np.ndarray], list[float]]:
    """Algorithm 2, a tensor at a time; and all trust ratios."""
    ends, ratios = [], []
    for number, first in enumerate(start):
        x = first.detach().double().numpy()
        m, v = np.zeros_like(x), np.zeros_like(x)
        for step in range(STEPS):
            g = gradients_of(start, step)[number].double().numpy()
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g**2
            m_hat = m / (1 - BETAS[0] ** (step + 1)) if corrected else m
            v_hat = v / (1 - BETAS[1] ** (step + 1)) if corrected else v
            r = m_hat / (np.sqrt(v_hat) + EPS)
            ratio = np.linalg.norm(x) / np.linalg.norm(r + decay * x)
            ratios.append(ratio)
            ratio = min(ratio, clip) if clip else ratio
            x = x - rate_of(step) * (ratio if adapted else 1.0) * (r + decay * x)
        ends.append(x)
    return ends, ratios


@pytest.mark.parametrize("decay", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("adapted", [True, False])
def test_against_the_paper(decay: float, corrected: bool, clip: float, adapted: bool):
    weights = weights_of()
    start = [w.detach().clone() for w in weights]
    groups = [{"params": weights, "is_adapted": adapted}]
    walk(Lamb(groups, 0.0, Moments(*BETAS, EPS, corrected), decay, trust_clip=clip), weights)
    ends, ratios = by_the_paper(start, decay, corrected, clip, adapted)
    assert min(ratios) < 0.5 < max(ratios)  # a clip of 0.5 is for some
    assert_near(weights, ends, start)


def test_one_step_by_hand():
    """The first r is the gradient's sign: |r| = 2 for four entries, |w| = 10; the ratio is 5, clipped to 3."""
    for clip, ratio in ((0.0, 5.0), (3.0, 3.0)):
        weight = nn.Parameter(torch.tensor([[1.0, 7.0], [-5.0, 5.0]]))
        weight.grad = torch.tensor([[0.1, -20.0], [3.0, 1.0]])
        Lamb([weight], lr=0.1, moments=Moments(eps=1e-12), trust_clip=clip).step()
        moved = 0.1 * ratio * torch.tensor([[1.0, -1.0], [1.0, 1.0]])
        torch.testing.assert_close(weight.detach(), torch.tensor([[1.0, 7.0], [-5.0, 5.0]]) - moved)


def test_decay_alone():
    """Where the gradient is 0 the update is decay w, of which the ratio leaves lr w, however small the decay."""
    for decay in (0.5, 1e-2, 1e-6):
        weight = nn.Parameter(torch.tensor([[3.0, -4.0]]))
        weight.grad = torch.zeros(1, 2)
        Lamb([weight], lr=0.1, weight_decay=decay).step()
        torch.testing.assert_close(weight.detach(), torch.tensor([[2.7, -3.6]]))


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_what_is_not_adapted_is_adamw(decay: float):
    """torch's, bit for bit, moments included."""
    weights, others = weights_of(), weights_of()
    ours = Lamb([{"params": weights, "is_adapted": False}], 0.1, Moments(*BETAS, EPS), decay)
    torchs = torch.optim.AdamW(others, 0.1, BETAS, EPS, decay, fused=True)
    walk(ours, weights)
    walk(torchs, others)
    assert same(bits(ours, weights), bits(torchs, others))


def test_moments_are_adamws_in_any_case():
    weights, others = weights_of(), weights_of()
    ours = Lamb(weights, 0.1, Moments(*BETAS, EPS), 0.2)
    torchs = torch.optim.AdamW(others, 0.1, BETAS, EPS, 0.2, fused=True)
    walk(ours, weights)
    walk(torchs, others)
    count = len(weights)
    assert same(bits(ours, weights)[count:], bits(torchs, others)[count:])
    assert not same(bits(ours, weights)[:count], bits(torchs, others)[:count])


def test_without_bias_correction_steps_are_counted_all_the_same():
    weights = weights_of()
    optimizer = Lamb(weights, 0.1, Moments(bias_correction=False))
    walk(optimizer, weights, 3)
    assert [optimizer.state[w]["step"].item() for w in weights] == [3.0] * len(weights)
