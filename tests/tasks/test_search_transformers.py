"""Greedy and beam search give what transformers' generate gives, token for token, whatever the batch."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from twins import BEGIN, END, PAD, twins

from hvdtrain.tasks.search import Input, SearchOptions, search

EARLY = {"no": False, "yes": True, "never": "never"}
NAMES = {  # ours: theirs
    "beam": "num_beams", "length_penalty": "length_penalty", "n_best": "num_return_sequences",
    "no_repeat_ngram": "no_repeat_ngram_size", "min_tokens": "min_new_tokens", "max_tokens": "max_new_tokens",
    "forced_first": "forced_bos_token_id", "forced_last": "forced_eos_token_id",
}  # fmt: skip
SIZES = {"layers": 2, "heads": 4, "width": 32, "context": 64, "ff_width": 64, "tied": False}
MODELS: dict[str, tuple[dict, int, float, float]] = {  # options, seed, deviation, end
    "gpt2": ({"activation": "gelu_tanh"}, 6, 2.0, 3.0),
    "llama": ({"kv_heads": 2, "positions": "rotary", "activation": "swiglu", "norm": "rmsnorm", "bias": False},
              5, 2.0, 0.0),
    "bart": ({"encoder_layers": 2, "norm_first": False, "embedding_norm": True, "position_offset": 2,
              "separate_positions": True, "head_bias": True}, 1, 1.5, 3.0),
    "t5": ({"encoder_layers": 2, "positions": "relative", "norm": "rmsnorm", "bias": False, "attention_scale": False,
            "activation": "geglu_tanh"}, 1, 1.5, 0.0),
}  # fmt: skip
Sides = Callable[[str], tuple[Any, Any, list[Input]]]


def random_rows(count: int, longest: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Of each kind our model, theirs, and 24 inputs of unequal length."""

    @cache
    def make(kind: str) -> tuple[Any, Any, list[Input]]:
        options, *how = MODELS[kind]
        folder: Path = tmp_path_factory.mktemp(kind) / "model"
        rows = random_rows(24, 12, 4)
        pairs = "encoder_layers" in options
        inputs = [Input([BEGIN], row, n) if pairs else Input(row, number=n) for n, row in enumerate(rows)]
        return *twins(folder, {**SIZES, **options}, 90, *how), inputs

    return make


@torch.no_grad()
def theirs_of(model: Any, inputs: list[Input], options: dict) -> list[list[tuple[list[int], float]]]:
    """What transformers makes of all inputs in one batch; decoders' prompts padded on the left, as it asks."""
    left = inputs[0].source is None
    rows = [list(item.tokens if left else item.source) for item in inputs]
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    padded = [[PAD] * pad + row if left else row + [PAD] * pad for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [0] * pad + [1] * len(row) if left else [1] * len(row) + [0] * pad for row, pad in zip(rows, pads, strict=True)
    ]
    words = {NAMES[name]: value for name, value in options.items() if name in NAMES}
    if options.get("beam", 1) > 1:
        words["early_stopping"] = EARLY[options.get("early_stopping", "no")]
    out = model.generate(
        torch.tensor(padded), attention_mask=torch.tensor(mask), do_sample=False, output_scores=True,
        return_dict_in_generate=True, **words,
    )  # fmt: skip
    new = [row[longest if left else 1 :].tolist() for row in out.sequences]
    texts = [row[: row.index(END)] if END in row else row for row in new]
    texts = [row[: options["max_tokens"]] for row in texts]
    scores = out.sequences_scores.tolist() if options.get("beam", 1) > 1 else [None] * len(texts)
    best = options.get("n_best", 1)
    pairs = list(zip(texts, scores, strict=True))
    return [pairs[at : at + best] for at in range(0, len(pairs), best)]


def assert_same(sides: Sides, kind: str, options: dict, batch_tokens: int = 100_000) -> list[list[int]]:
    model, theirs, inputs = sides(kind)
    expected = theirs_of(theirs, inputs, options)
    found = search(model, inputs, SearchOptions(**options, batch_tokens=batch_tokens), END)
    assert [[h.tokens for h in row] for row in found] == [[tokens for tokens, _ in row] for row in expected]
    for row, other in zip(found, expected, strict=True):
        for hypothesis, (_, score) in zip(row, other, strict=True):
            assert score is None or hypothesis.score == pytest.approx(score, rel=1e-4, abs=1e-5)
    return [row[0].tokens for row in found]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("batch_tokens", [1, 60, 100_000], ids=["one by one", "few", "all"])
def test_greedy(sides: Sides, kind: str, batch_tokens: int):
    texts = assert_same(sides, kind, {"max_tokens": 25}, batch_tokens)
    assert len({tuple(text) for text in texts}) > 18  # not degenerate
    assert len({len(text) for text in texts}) > 5


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
@pytest.mark.parametrize("early_stopping", ["no", "yes", "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams(sides: Sides, kind: str, early_stopping: str, length_penalty: float):
    options = {"beam": 4, "max_tokens": 20, "early_stopping": early_stopping, "length_penalty": length_penalty}
    texts = assert_same(sides, kind, {**options, "n_best": 3}, batch_tokens=300)
    assert (
        length_penalty == 0 or len({tuple(text) for text in texts}) > 18
    )  # where length costs nothing, many are empty


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
@pytest.mark.parametrize(
    "more",
    [{"no_repeat_ngram": 2, "length_penalty": 2.0}, {"min_tokens": 9}, {"length_penalty": -1.0}, {"forced_last": END},
     {"no_repeat_ngram": 1, "early_stopping": "yes"}, {"max_tokens": 1},
     {"beam": 1, "no_repeat_ngram": 3, "min_tokens": 5}],
    ids=lambda more: " ".join(more),
)  # fmt: skip
def test_rules(sides: Sides, kind: str, more: dict):
    assert_same(sides, kind, {"beam": 3, "max_tokens": 15, **more}, batch_tokens=200)


@pytest.mark.parametrize("beam", [1, 4])
def test_a_forced_first_token(sides: Sides, beam: int):
    texts = assert_same(sides, "bart", {"beam": beam, "max_tokens": 12, "forced_first": 33})
    assert {text[0] for text in texts} == {33}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_beams_of_other_families(sides: Sides, kind: str):
    """Heads that share keys and rotary positions; relative positions."""
    assert_same(sides, kind, {"beam": 4, "max_tokens": 20, "n_best": 2, "length_penalty": 2.0}, batch_tokens=200)
