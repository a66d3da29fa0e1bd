"""A model whose layers are spread over ranks, which are threads here, against the whole one. No dropout but where it is
what is tested.

In fp64, so that a wrong share, place or sum of the smallest tensor is seen beside the rounding of fp32 in the loss; how
near fp32 comes is said in tests/mpi/test_tensor.py.
"""

import pytest
import torch
from parts import SHORT_BIAS, Case, gradients, on_parts, put_together

from hvdtrain.comm.axis import Axis, LocalAxis
from hvdtrain.cut.blueprint import Blueprint, make_real
from hvdtrain.cut.tensor import spread
from hvdtrain.errors import ConfigError
from hvdtrain.models.lora import LoraOptions
from hvdtrain.models.recompute import AnyBlock
from hvdtrain.slices import tile, whole_rect
from hvdtrain.tasks.search import Input, search
from hvdtrain.tasks.search_options import SearchOptions

ALL = LoraOptions(rank=2, targets="all")
# Losses are fp32: seen 4e-7. A gradient below 1e-5 is one that is nothing but rounding, like a key's bias.
TOLERANCE, NOTHING = 1e-6, 1e-5

CASES = [
    Case("lm", {"preset": "llama", "kv_heads": 2}),
    Case("lm", {"preset": "gpt2", "head_bias": True}, parts=4),
    Case("lm", {"preset": "qwen2", "kv_heads": 4}, parts=4, positions=7),
    Case("lm", {"preset": "starcoder2", "window": 3}, sequence=False),
    Case("lm", {"positions": "relative", "ff_width": 37, "activation": "geglu_tanh", **SHORT_BIAS}, parts=4),
    Case("lm", {"preset": "llama"}, positions=7, lora=ALL),
    Case("lm", {"norm_first": False}, recompute="full"),
    Case("classify", {"preset": "bert"}, parts=4, lora=ALL),
    Case("classify", {"positions": "rotary"}, positions=7),
    Case("mlm", {"preset": "bert"}),
    Case("mlm", {"preset": "bert", "tied": False}, parts=4, positions=7),
    Case("span_qa", {"preset": "bert"}, sequence=False),
    Case("seq2seq", {"preset": "vaswani"}, parts=4),
    Case("seq2seq", {"preset": "bart"}, positions=7, lora=ALL),
    Case("seq2seq", {"preset": "t5", **SHORT_BIAS}, parts=4, positions=7),
    Case("seq2seq", {"preset": "t5_v1_1", "kv_heads": 2, **SHORT_BIAS}),
    Case("seq2seq", {"preset": "marian"}, sequence=False, lora=ALL),
    Case("seq2seq", {"preset": "pegasus"}, recompute="selective"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_whole_model(case: Case):
    whole = case.whole()
    loss = case.loss(whole)
    loss.backward()

    def work(axis: Axis):
        model, placed = case.part(axis, whole)
        own = case.loss(model)
        own.backward()
        return own.item(), (gradients(model), placed)

    found = on_parts(case.parts, work)
    assert [one for one, _ in found] == pytest.approx([loss.item()] * case.parts, rel=TOLERANCE)
    assert len({one for one, _ in found}) == 1, "all parts have the same loss, to the bit"
    for name, parameter in whole.named_parameters():
        if parameter.grad is None:
            assert all(grads[name] is None for _, (grads, _) in found)
            continue
        assert all(grads[name] is not None for _, (grads, _) in found), f"{name} has no gradient on a part"
        error = torch.linalg.norm(put_together(name, parameter.shape, [one for _, one in found]) - parameter.grad)
        assert error <= max(TOLERANCE * torch.linalg.norm(parameter.grad), TOLERANCE * NOTHING), name


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_the_parts_tile_the_whole(case: Case):
    whole = case.make()
    held = on_parts(case.parts, lambda axis: case.part(axis, whole)[1])
    for name, parameter in whole.named_parameters():
        places = [placed[name] for placed in held]
        all_of = whole_rect(parameter.shape)
        if places[0].copies == 1:
            assert tile([rect for place in places for rect in place.places], all_of), name
        else:
            assert all(place.places == (all_of,) and place.copies == case.parts for place in places), name


# --- evaluation and decoding: all parts do the same, on whole streams ------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case("lm", {"preset": "llama", "kv_heads": 2}),
        Case("lm", {"positions": "relative", "head_bias": True, **SHORT_BIAS}, parts=4),
        Case("seq2seq", {"preset": "marian"}),
        Case("seq2seq", {"preset": "t5", "context": 15, **SHORT_BIAS}, parts=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("search_options", [{"beam": 3}, {"temperature": 1.0, "top_p": 0.9}], ids=["beam", "drawn"])
def test_texts_are_the_same_token_for_token(case: Case, search_options: dict):
    whole, options = case.whole(dtype=torch.float32, factor=2.0).eval(), SearchOptions(max_tokens=9, **search_options)
    source = [[7, 3, 9], [1, 2, 3, 4, 5]] if case.task == "seq2seq" else [None, None]
    inputs = [Input([5], source[0], 0), Input([8, 2, 6], source[1], 1)]
    expected = search(whole, inputs, options, stop=0)

    def work(axis: Axis):
        return search(case.part(axis, whole)[0].eval(), inputs, options, stop=0)

    for found in on_parts(case.parts, work):
        for ours, theirs in zip(found, expected, strict=True):
            assert [one.tokens for one in ours] == [one.tokens for one in theirs]
            assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], rel=1e-5)


def test_an_evaluation_splits_no_stream():
    case = Case("lm")
    whole = case.whole()

    def work(axis: Axis):
        model, _ = case.part(axis, whole)
        with torch.no_grad():
            case.loss(model.eval())
        return axis.calls

    calls = on_parts(2, work)[0]
    assert not any(call.startswith("scatter_sum") for call in calls)
    assert sum(call.startswith("sum of [3, 8, 32]") for call in calls) == 5, (
        "the embedding, and two parts of each block"
    )


# --- what the user is told -------------------------------------------------------------------------------------------


def test_rows_that_do_not_divide_are_said_once():
    case, told = Case("lm"), []

    def work(axis: Axis):
        model = Blueprint(case.make).copy()
        spread(model, axis, True, told.append if axis.rank == 0 else lambda _: None)
        make_real(model, torch.device("cpu"))
        for positions in (8, 7, 5):
            model.embed(torch.zeros(2, positions, dtype=torch.int64))
        return model.into_blocks.missed

    assert on_parts(2, work) == [2, 2]
    (one,) = told
    assert "cut.sequence is off for rows of 7 tokens, and wherever mesh.tensor=2 does not divide" in one


@pytest.mark.parametrize(("sizes", "which"), [({"ff_width": 3}, "3 hidden units"), ({"ff_width": 1}, "1 hidden units")])
def test_a_model_smaller_than_the_axis_is_refused(sizes: dict, which: str):
    model = Blueprint(Case("lm", sizes).make).copy()
    with pytest.raises(ConfigError, match=f"mesh.tensor=4: the model has {which}"):
        spread(model, Twins(4), True)


# --- precision and compilation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_bf16_is_as_near_to_fp32_as_that_of_the_whole_model(precision: str):
    """Sums of parts are made in fp32. Seen, over more seeds: 0.98 to 1.06 of the whole model's distance."""
    case, ours, theirs = Case("lm", {"preset": "llama", "width": 64, "context": 48}, positions=48), 0.0, 0.0

    def graded(model, seed: int):
        computes = model.to(torch.bfloat16) if precision == "bf16-weights" else model
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = case.loss(computes, seed)
        loss.backward()
        return {name: grad.float() for name, grad in gradients(computes).items()}

    for seed in range(4):
        whole = case.whole(seed, torch.float32, factor=2.0)
        case.loss(whole, seed).backward()
        exact = gradients(whole)

        def work(axis: Axis, whole=whole, seed=seed):
            model, placed = case.part(axis, whole)
            return graded(model, seed), placed

        parts = on_parts(2, work)
        whole.zero_grad()
        rounded = graded(whole, seed)
        for name, expected in exact.items():
            ours += float((put_together(name, expected.shape, parts) - expected).square().sum())
            theirs += float((rounded[name] - expected).square().sum())
    assert 0 < ours**0.5 <= 1.1 * theirs**0.5


class Twins(LocalAxis):
    """Part 0 of several that do all the same."""

    def __init__(self, size: int):
        self.size = size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(self.size)

    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([part] * self.size, dim)

    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.stack(tensor.chunk(self.size, dim)).sum(0)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning", "ignore:The .grad attribute")  # inside torch
def test_a_compiled_block_stays_one_graph():
    from torch._dynamo.utils import counters  # loads the compiler

    counters.clear()
    case = Case("lm", {"preset": "llama"}, lora=LoraOptions(rank=2, targets="q,down"))
    whole, found = case.whole(dtype=torch.float32), []
    for compiled in (False, True):
        model, _ = case.part(Twins(2), whole)
        for block in model.modules():
            if isinstance(block, AnyBlock) and compiled:
                block.compile(fullgraph=True)  # a break is an error
        loss = case.loss(model)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (eager, expected), (loss, grads) = found
    assert loss == pytest.approx(eager, rel=1e-5)
    assert torch.linalg.norm(grads - expected) <= 1e-5 * torch.linalg.norm(expected)
    assert counters["stats"]["unique_graphs"] == 1, "which serves both blocks"
