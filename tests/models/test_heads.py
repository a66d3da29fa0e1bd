"""Heads: what they multiply, and that a loss sees the same logits."""

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_decoder

from hvdtrain.models.losses import LossTerms, linear_cross_entropy
from hvdtrain.models.options import TransformerOptions


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"head_scale": True}, {"head_bias": True}, {"tied": False, "head_bias": True}])
def test_logits_are_features_times_weight_plus_bias(options: dict):
    model = tiny_decoder(**options)
    head, hidden = model.head, torch.randn(2, 3, 16)
    assert (head.bias is not None) == options.get("head_bias", False)
    if head.bias is not None:
        assert not head.bias.any()  # at the start
        head.bias.normal_()
    expected = (hidden / 4 if "head_scale" in options else hidden) @ head.weight.T  # 4: the root of width 16
    expected = expected + head.bias if head.bias is not None else expected
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-5, atol=1e-6)
    targets = torch.tensor([[4, 0, 49], [7, 7, 1]])
    features = head.features(hidden).flatten(0, 1)
    loss = linear_cross_entropy(features, head.weight, targets.flatten(), LossTerms(), bias=head.bias)
    assert loss.item() == pytest.approx(-expected.log_softmax(-1).gather(2, targets[..., None]).sum().item(), rel=1e-5)


def test_a_scale_is_for_a_tied_head():
    with pytest.raises(ValidationError, match=r"head_scale=true is for an output layer that shares .* set tied=true"):
        TransformerOptions(head_scale=True, tied=False)
