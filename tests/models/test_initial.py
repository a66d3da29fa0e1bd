"""How weights start where they do not start as GPT-2's (which is in test_decoder.py and test_seq2seq.py)."""

import math

import pytest
import torch
from torch import Tensor

from hvdtrain.models.encoder import MaskedLanguageModel
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

WIDTH, HEADS, HEAD, HIDDEN = 128, 4, 24, 200


def started(**options) -> dict[str, Tensor]:
    sizes = {"layers": 2, "heads": HEADS, "width": WIDTH, "head_width": HEAD, "ff_width": HIDDEN, "context": 64}
    model = Seq2Seq(TransformerOptions(**sizes, **options), 400)
    model.initialise(1)
    weights = dict(model.named_parameters())
    for name in [name for name, weight in weights.items() if weight.dim() < 2]:
        assert set(weights.pop(name).tolist()) == {0.0 if name.endswith("bias") else 1.0}, name
    return weights


def assert_deviation(weight: Tensor, deviation: float, name: str) -> None:
    spread = 4 / math.sqrt(2 * weight.numel())  # four standard errors of a standard deviation
    assert weight.std().item() == pytest.approx(deviation, rel=spread), name


def test_post_norm_blocks_start_alike_in_any_depth():
    for name, weight in started(norm_first=False).items():
        assert_deviation(weight, 0.02, name)


def test_xavier_goes_by_each_matrix():
    """Uniform: the largest number is the bound, up to 1 %. Of queries, keys and values as if they were one matrix."""
    inner = HEADS * HEAD
    for name, weight in started(init="xavier", tied=False, separate_positions=True).items():
        if name in ("embedding.weight", "position.weight", "encoder_position.weight", "head.weight"):
            assert_deviation(weight, WIDTH**-0.5, name)
            continue
        total = {"out": inner + WIDTH, "up": WIDTH + HIDDEN, "qkv": 4 * WIDTH, "q": 4 * WIDTH, "kv": 4 * WIDTH}
        part = name.split(".")[-2]
        bound = math.sqrt(6 / (HIDDEN + WIDTH if "feed_forward" in name else total[part]))
        assert 0.99 * bound < weight.abs().max().item() <= bound, name
        assert_deviation(weight, bound / math.sqrt(3), name)


def test_t5():
    """Queries by another root of the head's width, as nothing divides their products by it."""
    inner = HEADS * HEAD
    for name, weight in started(preset="t5").items():
        if name.endswith("qkv.weight"):
            assert_deviation(weight[:inner], (WIDTH * HEAD) ** -0.5, name)
            weight = weight[inner:]
        deviation = weight.shape[1] ** -0.5
        if name.endswith("embedding.weight"):
            deviation = 1.0
        elif name.endswith("relative.weight"):
            deviation = WIDTH**-0.5
        elif name.endswith("cross_attention.q.weight"):
            deviation = (WIDTH * HEAD) ** -0.5
        assert_deviation(weight, deviation, name)


def test_unscaled_queries_start_smaller_in_any_way():
    scaled, unscaled = started(), started(attention_scale=False)
    for name, weight in scaled.items():
        factor = math.sqrt(HEAD) if name.endswith((".qkv.weight", ".q.weight")) else 1
        assert (unscaled[name][: HEADS * HEAD] * factor).allclose(weight[: HEADS * HEAD]), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_models_head_hands_on_what_it_reads_where_scores_are_products_with_the_embeddings(tied: bool):
    model = MaskedLanguageModel(TransformerOptions(layers=1, heads=HEADS, width=WIDTH, context=64, tied=tied), 400)
    started = dict(model.initial(1))
    if tied:
        assert torch.equal(started.pop("head.dense.weight"), torch.eye(WIDTH))
        assert "head.weight" not in started
    for name in ("encoder.embedding.weight", "head.dense.weight", "head.weight"):
        if name in started:
            assert_deviation(started[name], 0.02, name)
