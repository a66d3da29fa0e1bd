"""A model that is built without memory has the weights, the tables and the ties of one that was built with it."""

import pytest
import torch
from tiny import CPU

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.cut.blueprint import Blueprint, fill_slices, make_real
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

MODELS = {
    "decoder": lambda: Decoder(TransformerOptions(layers=2, width=16, heads=2, positions="rotary"), 40),
    "seq2seq": lambda: Seq2Seq(TransformerOptions(layers=2, width=16, heads=2, positions="sinusoidal"), 40),
    "classifier": lambda: Classifier(TransformerOptions(layers=2, width=16, heads=2, init="xavier"), 40, 5, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_made_real_it_is_the_model_itself(name: str):
    blueprint = Blueprint(MODELS[name])
    assert all(parameter.is_meta for parameter in blueprint.model.parameters())
    model, expected = blueprint.copy(), MODELS[name]()
    make_real(model, CPU)
    slices = blueprint.slices(model, whole_replicas(LocalGroup()))
    fill_slices(slices, blueprint.initial(3))
    expected.initialise(3)
    assert [piece.name for piece in slices] == [name for name, _ in expected.named_parameters()]
    assert [*model.state_dict()] == [*expected.state_dict()]
    for found, known in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(found, known)
    for found, known in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(found, known)
    ties = [[id(p) for _, p in m.named_parameters(remove_duplicate=False)] for m in (model, expected)]
    assert len(set(ties[0])) == len(set(ties[1])) == len(slices)


def test_what_is_frozen_stays_frozen():
    def make() -> Decoder:
        model = MODELS["decoder"]()
        model.embedding.requires_grad_(False)
        return model

    model = (blueprint := Blueprint(make)).copy()
    make_real(model, CPU)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in blueprint.model.parameters()]
    assert not model.head.weight.requires_grad
