"""Drawing the next token, and text beyond the context."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import CPU, tiny_decoder

from hvdtrain.tasks.decoding import SamplingOptions, next_token_probabilities, sample

LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()


def probabilities(logits: torch.Tensor = LOGITS, **options) -> list[float]:
    return next_token_probabilities(
        logits, SamplingOptions(temperature=options.pop("temperature", 1.0), **options)
    ).tolist()


def test_the_models_own_distribution():
    assert probabilities() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert probabilities(LOGITS + 7) == pytest.approx([0.5, 0.25, 0.125, 0.125])


def test_temperature():
    """At temperature T the probabilities are p^(1/T), made to sum to 1 again."""
    assert probabilities(temperature=0.5) == pytest.approx([p / 11 for p in (8, 2, 0.5, 0.5)])
    assert probabilities(temperature=0) == [1, 0, 0, 0]
    assert probabilities(temperature=1e6) == pytest.approx([0.25] * 4, abs=1e-5)
    assert probabilities(temperature=1e-3) == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])
def test_a_temperature_of_nearly_0_is_greedy_too(temperature: float):
    """Dividing by it overflows fp32; that must not end in NaN."""
    assert probabilities(torch.tensor([-3.0, 9.0, 2.0]), temperature=temperature) == [0, 1, 0]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(0, [0.5, 0.25, 0.125, 0.125]), (1, [1, 0, 0, 0]), (2, [2 / 3, 1 / 3, 0, 0]), (4, [0.5, 0.25, 0.125, 0.125]),
     (99, [0.5, 0.25, 0.125, 0.125])],
)  # fmt: skip
def test_top_k(top_k: int, expected: list[float]):
    assert probabilities(top_k=top_k) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1.0, [0.5, 0.25, 0.125, 0.125]), (0.9, [0.5, 0.25, 0.125, 0.125]), (0.8, [4 / 7, 2 / 7, 1 / 7, 0]),
     (0.6, [2 / 3, 1 / 3, 0, 0]), (0.4, [1, 0, 0, 0]), (1e-9, [1, 0, 0, 0])],
)  # fmt: skip
def test_top_p_is_the_smallest_set_that_holds_it(top_p: float, expected: list[float]):
    found = probabilities(top_p=top_p)
    assert sorted(found, reverse=True) == pytest.approx(expected)  # of two that are equal either may go


def test_top_k_then_top_p():
    assert probabilities(top_k=2, top_p=0.6) == [1, 0, 0, 0]


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.just(0.0) | st.floats(1e-3, 100),
    st.integers(0, 50),
    st.floats(1e-6, 1),
)
def test_it_is_always_a_distribution_with_the_likeliest_in_it(logits: list, temperature: float, k: int, p: float):
    values = torch.tensor(logits)
    found = torch.tensor(probabilities(values, temperature=temperature, top_k=k, top_p=p))
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert (found >= 0).all()
    assert found[values == values.max()].max() > 0
    assert torch.equal(values, torch.tensor(logits))  # the logits are the caller's


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1},
              {"max_tokens": 0}, {"seed": -1}],
)  # fmt: skip
def test_impossible_options(wrong: dict):
    with pytest.raises(ValidationError):
        SamplingOptions(**wrong)


# --- text --------------------------------------------------------------------------------------------------------


def draw(model, prompt: list[int], stop: int | None = None, **options) -> list[int]:
    return list(sample(model, prompt, SamplingOptions(**{"max_tokens": 20, **options}), CPU, stop))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_the_seed_decides(positions: str):
    model = tiny_decoder(positions=positions).eval()
    text = draw(model, [1, 2], temperature=1.0)
    torch.rand(3)
    assert draw(model, [1, 2], temperature=1.0) == text
    assert draw(model, [1, 2], temperature=1.0, seed=2) != text
    assert len(text) == 20


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("prompt", [[3], [3, 1, 4], list(range(8)), list(range(40))], ids=["1", "3", "8", "40"])
def test_greedy_text_beyond_the_context(positions: str, prompt: list[int]):
    """Against the model without a cache, which sees what the window holds: up to 8 tokens, then the newest 4 and on."""
    model = tiny_decoder(positions=positions, context=8, tied=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)  # far from a uniform guess: no ties
        window, expected = prompt[-8:], []
        for _ in range(30):
            expected.append(int(model.logits(model(torch.tensor([window])))[0, -1].argmax()))
            window = [*window, expected[-1]]
            if len(window) > 8:
                window = window[-4:]
    assert draw(model, prompt, temperature=0.0, max_tokens=30) == expected
    assert len(set(expected)) > 3


def test_a_context_of_one():
    assert len(draw(tiny_decoder(context=1).eval(), [5, 6])) == 20


def test_it_stops_at_the_end_of_a_text():
    model = tiny_decoder().eval()
    text = draw(model, [1], temperature=1.0, max_tokens=40)
    stop = text[7]
    assert draw(model, [1], stop, temperature=1.0, max_tokens=40) == text[: text.index(stop)]


def test_the_padding_of_the_vocabulary_is_never_drawn():
    model = tiny_decoder(vocab_size=5, vocab_multiple=64).eval()
    assert max(draw(model, [1], temperature=100.0, max_tokens=200)) < 5


def test_the_prompt_is_left_alone():
    prompt = [1, 2, 3]
    draw(tiny_decoder().eval(), prompt)
    assert prompt == [1, 2, 3]
