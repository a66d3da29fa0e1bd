"""The search by itself: what it draws, text beyond the context, batches, what it refuses.

What it finds is compared with transformers in test_search_transformers.py, what the cache does in models/test_cache.py.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import tiny_decoder

from hvdtrain.errors import ConfigError
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.tasks.next_token import likeliest, probabilities
from hvdtrain.tasks.search import Hypothesis, Input, SearchOptions, search

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()


# --- the distribution --------------------------------------------------------------------------------------------


def distribution(logits: torch.Tensor = LOGITS, **options) -> list[float]:
    options = SearchOptions(temperature=options.pop("temperature", 1.0), **options)
    return probabilities(options, torch.stack([torch.randn(len(logits)), logits]))[1].tolist()


def test_the_models_own_distribution():
    assert distribution() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert distribution(LOGITS + 7) == pytest.approx([0.5, 0.25, 0.125, 0.125])


def test_temperature():
    """At temperature T the probabilities are p^(1/T), made to sum to 1 again."""
    assert distribution(temperature=0.5) == pytest.approx([p / 11 for p in (8, 2, 0.5, 0.5)])
    assert distribution(temperature=1e6) == pytest.approx([0.25] * 4, abs=1e-5)
    assert distribution(temperature=1e-3) == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
def test_a_temperature_of_nearly_0_is_greedy(temperature: float):
    """Dividing by it overflows fp32; that must not end in NaN."""
    assert distribution(torch.tensor([-3.0, 9.0, 2.0]), temperature=temperature) == [0, 1, 0]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(0, [0.5, 0.25, 0.125, 0.125]), (1, [1, 0, 0, 0]), (2, [2 / 3, 1 / 3, 0, 0]), (4, [0.5, 0.25, 0.125, 0.125]),
     (99, [0.5, 0.25, 0.125, 0.125])],
)  # fmt: skip
def test_top_k(top_k: int, expected: list[float]):
    assert distribution(top_k=top_k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1.0, [0.5, 0.25, 0.125, 0.125]), (0.9, [0.5, 0.25, 0.125, 0.125]), (0.8, [4 / 7, 2 / 7, 1 / 7, 0]),
     (0.6, [2 / 3, 1 / 3, 0, 0]), (0.4, [1, 0, 0, 0]), (1e-9, [1, 0, 0, 0])],
)  # fmt: skip
def test_top_p_is_the_smallest_set_that_holds_it(top_p: float, expected: list[float]):
    assert sorted(distribution(top_p=top_p), reverse=True) == pytest.approx(expected)  # of two equals either may go


def test_top_k_then_top_p():
    assert distribution(top_k=2, top_p=0.6) == [1, 0, 0, 0]


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.floats(1e-3, 100),
    st.integers(0, 50),
    st.floats(1e-6, 1),
)
def test_it_is_always_a_distribution_with_the_likeliest_in_it(logits: list, temperature: float, k: int, p: float):
    values = torch.tensor([logits])
    found = probabilities(SearchOptions(temperature=temperature, top_k=k, top_p=p), values)[0]
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert (found >= 0).all()
    assert found[values[0] == values.max()].max() > 0
    assert torch.equal(values, torch.tensor([logits]))  # the logits are the caller's


# --- candidates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [3, 64, 100, 640, 1000, 4097])
@pytest.mark.parametrize("beams", [1, 4])
def test_the_likeliest_of_all_beams(vocabulary: int, beams: int):
    values = torch.randn(5, beams, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    values[:, :, 1:-1:3] = -torch.inf
    values[0, :, -1] = 9.0  # in the last block, which may be a part of one
    count = min(2 * beams, beams * vocabulary)
    top, places = likeliest(values, count)
    torch.testing.assert_close(top, values.flatten(1).topk(count).values, rtol=0, atol=0)
    torch.testing.assert_close(values.flatten(1).gather(1, places), top, rtol=0, atol=0)
    assert all(len(set(row)) == count for row in places.tolist())


# --- text --------------------------------------------------------------------------------------------------------


def large(model):
    """Far from a uniform guess: no ties."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)
    return model.eval()


def draw(model, prompts: list[list[int]], stop: int | None = None, first: int = 0, **options) -> list[list[int]]:
    inputs = [Input(prompt, number=first + number) for number, prompt in enumerate(prompts)]
    found = search(model, inputs, SearchOptions(**{"max_tokens": 20, **options}), stop)
    return [hypothesis.tokens for (hypothesis,) in found]


PROMPTS = [[1, 2], [3], [1, 2], [9, 8, 7, 6, 5, 4, 3], list(range(20)), [3]]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_seed_and_the_inputs_number_decide(positions: str):
    """Whoever shares the batch, and however many ranks share the inputs."""
    model = tiny_decoder(positions=positions).eval()
    texts = draw(model, PROMPTS, temperature=1.0)
    assert {len(text) for text in texts} == {20}
    assert texts[0] != texts[2]  # of equal prompts
    torch.rand(3)
    for batch_tokens in (1, 9):
        assert draw(model, PROMPTS, temperature=1.0, batch_tokens=batch_tokens) == texts
    assert draw(model, PROMPTS[2:4], first=2, temperature=1.0) == texts[2:4]
    assert draw(model, PROMPTS, temperature=1.0, seed=2) != texts


def test_what_is_drawn_is_as_likely_as_it_should_be():
    """4,000 inputs draw one token each; 5 standard deviations."""
    model = tiny_decoder(vocab_size=6).eval()
    with torch.no_grad():
        expected = model.logits(model(torch.tensor([[2]])))[0, 0, :6].mul(2).softmax(-1)
        counts = torch.bincount(
            torch.tensor(draw(model, [[2]] * 4000, temperature=0.5, max_tokens=1)).flatten(), minlength=6
        )
    deviation = (4000 * expected * (1 - expected)).sqrt()
    assert ((counts - 4000 * expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_greedy_text_beyond_the_context(positions: str):
    """Against the model without a cache, which sees what the window holds: up to 8 tokens, then the newest 4 and on."""
    model = large(tiny_decoder(positions=positions, context=8, tied=False))
    prompts = [[3], [3, 1, 4], list(range(8)), list(range(40))]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            window, text = prompt[-8:], list[int]()
            for _ in range(30):
                text.append(int(model.logits(model(torch.tensor([window])))[0, -1].argmax()))
                window = [*window, text[-1]]
                if len(window) > 8:
                    window = window[-4:]
            expected.append(text)
    assert draw(model, prompts, max_tokens=30) == expected
    assert all(len(set(text)) > 3 for text in expected)


def test_a_context_of_one():
    assert len(draw(tiny_decoder(context=1).eval(), [[5, 6]])[0]) == 20


def test_the_score_of_text_beyond_the_context_counts_all_of_it():
    model = tiny_decoder().eval()
    options = SearchOptions(max_tokens=30, temperature=1.0, length_penalty=0.0)
    ((whole,),) = search(model, [Input([1])], options, None)
    assert whole.score < -20 * math.log(40)  # a model that knows nothing yet: about log 50 a token


def test_it_stops_at_the_end_of_a_text():
    model = tiny_decoder().eval()
    texts = draw(model, [[1], [2]], temperature=1.0, max_tokens=40)
    stop = texts[0][7]
    for text, found in zip(texts, draw(model, [[1], [2]], stop, temperature=1.0, max_tokens=40), strict=True):
        assert found == (text[: text.index(stop)] if stop in text else text)


@pytest.mark.parametrize("how", [{"temperature": 100.0}, {"beam": 4}])
def test_the_padding_of_the_vocabulary_never_comes(how: dict):
    model = large(tiny_decoder(vocab_size=5, vocab_multiple=64, context=64, tied=False))
    assert max(draw(model, [[1]], max_tokens=60, **how)[0]) < 5


def test_beams_and_targets_end_at_the_context():
    """The last token need not be read again: 8 positions hold a prompt of 3 and 5 of 6 tokens."""
    model = large(tiny_decoder(tied=False))
    assert [len(text) for text in draw(model, [[1, 2, 3], [1] * 8], beam=2)] == [6, 1]
    pairs = Seq2Seq(TransformerOptions(layers=1, heads=2, width=16, context=8), 50)
    pairs.initialise(0)
    inputs = [Input([1], source=[4, 5]), Input([1, 2], source=[])]
    found = search(pairs.eval(), inputs, SearchOptions(), None)
    assert [(len(h.tokens), h.is_cut) for (h,) in found] == [(8, True), (7, True)]
    found = search(pairs, inputs, SearchOptions(max_tokens=7), None)  # so many were asked for
    assert [(len(h.tokens), h.is_cut) for (h,) in found] == [(7, False), (7, False)]
    found = search(pairs, inputs, SearchOptions(forced_last=3), 3)  # an end that it was given
    assert [(len(h.tokens), h.is_cut) for (h,) in found] == [(7, True), (6, True)]


def test_no_input_no_output_and_the_prompt_is_left_alone():
    prompt = [1, 2, 3]
    assert search(tiny_decoder(), [], SearchOptions(), None) == []
    draw(tiny_decoder().eval(), [prompt])
    assert prompt == [1, 2, 3]


def test_n_best_come_from_the_best_down():
    model = large(tiny_decoder(tied=False))
    (found,) = search(model, [Input([4])], SearchOptions(beam=5, n_best=4, max_tokens=5, length_penalty=0.5), 2)
    scores = [hypothesis.score for hypothesis in found]
    assert (len(found), scores) == (4, sorted(scores, reverse=True))
    best: Hypothesis = found[0]
    with torch.no_grad():
        text = [4, *best.tokens, *([2] if len(best.tokens) < 5 else [])]
        log_p = model.logits(model(torch.tensor([text[:-1]])))[0].log_softmax(-1)
        total = log_p.gather(1, torch.tensor(text[1:])[:, None]).sum().item()
    assert best.score == pytest.approx(total / (len(text) - 1) ** 0.5, rel=1e-4)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"beam": 0}, "greater than or equal to 1"),
        ({"temperature": -1.0}, "greater than or equal to 0"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 0.0}, "greater than 0"),
        ({"top_p": 1.1}, "less than or equal to 1"),
        ({"top_k": -1}, "greater than or equal to 0"),
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"beam": 3, "n_best": 4}, "n_best=4 hypotheses of beam=3; raise beam, or lower n_best"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is more than max_tokens=8"),
        ({"beam": 2, "temperature": 0.8}, "beam=2 takes the likeliest; with temperature=0.8 set beam=1"),
        ({"early_stopping": "maybe"}, "'no', 'yes' or 'never'"),
    ],
)  # fmt: skip
def test_impossible_options(wrong: dict, told: str):
    with pytest.raises(ValidationError, match=told):
        SearchOptions(**wrong)


def test_yes_and_no_of_yaml():
    assert [SearchOptions(early_stopping=word).early_stopping for word in (True, False, "never")] == [
        "yes",
        "no",
        "never",
    ]


@pytest.mark.parametrize(
    ("item", "options", "told"),
    [
        (Input([1]), {"forced_first": 50}, r"forced_first=50 is not in the vocabulary, which has 50 tokens \(from 0\)"),
        (Input([1]), {"forced_last": 70}, "forced_last=70 is not in the vocabulary"),
        (Input([], number=4), {}, "input 5 has no token to go on from"),
        (
            Input([1] * 9, number=6),
            {"beam": 2},
            "input 7 begins with 9 tokens, more than model.context=8; .*, or set",
        ),
        (Input([1], source=[3] * 12), {}, "input 1 has 12 tokens, more than model.context=8; shorten it"),
        (Input([1] * 9, source=[3]), {}, "input 1 begins with 9 tokens, more than model.context=8; shorten it$"),
    ],
)
def test_impossible_inputs(item: Input, options: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        search(tiny_decoder(), [Input([1]), item], SearchOptions(**options), None)
