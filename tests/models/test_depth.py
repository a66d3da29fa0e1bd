"""How deep a parameter lies, what a user may call it, and how fast and whether at all it is trained."""

import pytest
import torch
from tiny import tiny_decoder

from hvdtrain.errors import ConfigError
from hvdtrain.models.depth import chosen, distances_from_head, grouped, rate_shares
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.frozen import freeze
from hvdtrain.models.lora import LoraOptions
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

SMALL = TransformerOptions(layers=3, heads=2, width=8, context=4)


def names_of(model: torch.nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


CLASSIFIER = names_of(Classifier(SMALL, 10, 3))


def test_distances_are_counted_from_the_head_down():
    found = distances_from_head(CLASSIFIER)
    assert found["encoder.embedding.weight"] == found["encoder.position.weight"] == 4
    assert [found[f"encoder.blocks.{number}.attention.qkv.weight"] for number in range(3)] == [3, 2, 1]
    assert {name for name, distance in found.items() if distance == 0} == {
        name for name in CLASSIFIER if name.startswith(("encoder.norm", "pooler", "head"))
    }


def test_each_stack_is_counted_from_its_own_top():
    found = distances_from_head(names_of(Seq2Seq(SMALL.model_copy(update={"encoder_layers": 2}), 10)))
    assert [found[f"encoder_blocks.{number}.attention.out.bias"] for number in range(2)] == [2, 1]
    assert [found[f"blocks.{number}.attention.out.bias"] for number in range(3)] == [3, 2, 1]
    assert (found["embedding.weight"], found["encoder_norm.weight"], found["norm.weight"]) == (4, 0, 0)


def test_rates_fall_by_a_factor_from_layer_to_layer():
    shares = rate_shares(CLASSIFIER, 0.5)
    assert shares["head.weight"] == 1
    assert shares["encoder.blocks.2.feed_forward.up.weight"] == 0.5
    assert shares["encoder.embedding.weight"] == 0.5**4
    assert set(rate_shares(CLASSIFIER, 1.0).values()) == {1.0}


@pytest.mark.parametrize(
    ("which", "begin_with"),
    [
        (0, ("encoder.embedding", "encoder.position")),
        (2, ("encoder.embedding", "encoder.position", "encoder.blocks.0.", "encoder.blocks.1.")),
        ("pooler", ("pooler",)),
        ("encoder.blocks.1, head", ("encoder.blocks.1.", "head")),
        ("*.feed_forward.*", tuple(f"encoder.blocks.{number}.feed_forward." for number in range(3))),
        ("encoder", ("encoder.",)),
    ],
)
def test_parameters_are_chosen_by_number_name_beginning_or_glob(which: int | str, begin_with: tuple[str, ...]):
    assert chosen(CLASSIFIER, which, "optim.freeze") == [n for n in CLASSIFIER if n.startswith(begin_with)]


def test_the_beginning_of_a_name_is_whole_parts():
    names = ["blocks.1.w", "blocks.10.w"]
    assert chosen(names, "blocks.1", "optim.freeze") == ["blocks.1.w"]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (4, r"optim.freeze=4: the model has 3 layers"),
        ("head,hed", r"optim.freeze: nothing is called 'hed'; there are: encoder.embedding \(1\), .*, head \(2\)"),
        ("*", r"optim.freeze=\* leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused_with_what_there_is(which: int | str, message: str):
    with pytest.raises(ConfigError, match=message):
        freeze(Classifier(SMALL, 10, 3), which, None, scores_tokens=False)


def test_names_are_told_in_groups():
    assert grouped(["blocks.0.a.w", "blocks.1.a.w", "head.w"]) == "blocks.*.a (2), head (1)"


def test_backward_makes_no_gradient_of_what_is_frozen():
    model = tiny_decoder(seed=1)
    freeze(model, 1, None, scores_tokens=True)
    model.logits(model(torch.tensor([[1, 2, 3]]))).sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {n for n in names_of(model) if not n.startswith(("embedding", "position", "blocks.0"))}


@pytest.mark.parametrize("scores_tokens", [True, False])
def test_beside_adapters_only_a_new_kind_of_head_is_trained(scores_tokens: bool):
    model = Classifier(SMALL, 10, 3)
    freeze(model, "", LoraOptions(also="encoder.norm"), scores_tokens)
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and "norm" not in name}
    assert trained == (set() if scores_tokens else {"pooler", "head"})
    assert model.encoder.norm.weight.requires_grad
