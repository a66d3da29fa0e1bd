"""A model whose layers are spread over ranks, which are threads here, against the whole one. No dropout but where it is
what is tested.

In fp64, so that a wrong share, place or sum of the smallest tensor is seen beside the rounding of fp32 in the loss; how
near fp32 comes is said in tests/mpi/test_tensor.py.
"""

import pytest
import torch
from parts import SHORT_BIAS, Case, gradients, on_parts, put_together

from hvdtrain.comm.axis import Axis
from hvdtrain.models.lora import LoraOptions
from hvdtrain.slices import tile, whole_rect

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
