"""Heads: what they multiply, and that a loss sees the same logits."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from tiny import tiny_decoder

from hvdtrain.models.encoder import MaskedLanguageModel, SpanModel
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


@torch.no_grad()
def test_a_masked_models_head_is_berts():
    """Dense, the activation, a norm, then the embedding's matrix and a bias; of the positions alone that are picked."""
    model = MaskedLanguageModel(TransformerOptions(preset="bert", layers=1, width=16, context=8), 50)
    model.initialise(0)
    head = model.head
    head.bias.normal_()
    hidden = model(torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), torch.tensor([4, 3]))
    picked = hidden[[0, 1], [2, 1]]
    dense = picked @ head.dense.weight.T + head.dense.bias
    normed = F.layer_norm(F.gelu(dense), (16,), head.norm.weight, head.norm.bias, 1e-12)
    expected = normed @ model.encoder.embedding.weight.T + head.bias
    torch.testing.assert_close(model.logits(picked), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.logits(hidden)[[0, 1], [2, 1]], expected, rtol=1e-4, atol=1e-5)
    targets = torch.tensor([7, 30])
    loss = linear_cross_entropy(head.features(picked), head.weight, targets, LossTerms(), bias=head.bias)
    assert loss.item() == pytest.approx(F.cross_entropy(expected, targets, reduction="sum").item(), rel=1e-5)


@torch.no_grad()
def test_spans_are_two_scores_of_each_position():
    model = SpanModel(TransformerOptions(layers=1, width=16, context=8), 50)
    model.initialise(0)
    tokens, lengths = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), torch.tensor([4, 3])
    found = model(tokens, lengths)
    assert found.shape == (2, 4, 2)
    head = model.head
    torch.testing.assert_close(found, model.encoder(tokens, lengths) @ head.weight.T + head.bias)
