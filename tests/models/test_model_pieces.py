"""A model in pieces: stages that follow one another are the whole model, to the bit."""

import copy
from collections.abc import Callable

import pytest
import torch

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier, MaskedLanguageModel, SpanModel
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Flow, Staged, keep
from hvdtrain.models.recompute import RecomputeOptions, use_recompute
from hvdtrain.models.seq2seq import Seq2Seq

TOKENS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))
SOURCE = torch.randint(3, 40, (3, 9), generator=torch.Generator().manual_seed(2))
LENGTHS = torch.tensor([7, 5, 3])
CPU = torch.device("cpu")

MODELS: dict[str, tuple[Callable[..., Staged], tuple[torch.Tensor, ...]]] = {
    "decoder": (Decoder, (TOKENS,)),
    "classifier": (lambda o, v: Classifier(o, v, 3), (TOKENS, LENGTHS)),
    "masked": (MaskedLanguageModel, (TOKENS, LENGTHS)),
    "spans": (SpanModel, (TOKENS, LENGTHS)),
    "seq2seq": (Seq2Seq, (SOURCE, torch.tensor([9, 4, 6]), TOKENS)),
}


def made(name: str, **options: object) -> Staged:
    small = {"layers": 3, "width": 16, "heads": 2, "context": 16, **options}
    model = MODELS[name][0](TransformerOptions(**small), 40)
    model.initialise(1)
    return model.train()


def cut(model: Staged, stages: int) -> list[Staged]:
    """Copies, each with its share of the pieces, as even as can be; cut within blocks too."""
    pieces = model.pieces()
    ends = [round(len(pieces) * n / stages) for n in range(stages + 1)]
    copies = [copy.deepcopy(model) for _ in range(stages)]
    for number, one in enumerate(copies):
        keep(one, pieces, pieces[ends[number] : ends[number + 1]])
    return copies


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
@pytest.mark.parametrize("name", MODELS)
def test_stages_are_the_whole_model_and_draw_what_it_draws(name: str, positions: str, recompute: str):
    """Outputs and gradients, with dropout; the second microbatch begins before the first has gone backward."""
    model, inputs = made(name, positions=positions, dropout=0.3), MODELS[name][1]
    stages = cut(model, 4)
    expected: list[torch.Tensor] = []
    for seed in (5, 6):
        model.draws.begin(seed, CPU)
        expected.append(model(*inputs))
        expected[-1].square().sum().backward()
    for one in stages:
        use_recompute(one, RecomputeOptions(name=recompute))
    found = []
    for seed in (5, 6):
        flow: Flow = ()
        for one in stages:
            one.draws.begin(seed, CPU)
            flow = one.stage(flow, *inputs)
        found.append(flow[-1])
    for output, whole in zip(found, expected, strict=True):
        assert torch.equal(output, whole)
        output.square().sum().backward()
    gradients: dict[str, torch.Tensor] = {}
    first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    names = {path: first[id(p)] for path, p in model.named_parameters(remove_duplicate=False)}
    for one in stages:
        for path, parameter in one.named_parameters():
            if parameter.grad is not None:
                gradients[names[path]] = gradients.get(names[path], torch.zeros(())) + parameter.grad
    for path, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[path], parameter.grad, rtol=1e-5, atol=1e-6)


def test_another_microbatch_draws_other_numbers():
    model = made("decoder", dropout=0.3)
    model.draws.begin(5, CPU)
    first = model(TOKENS)
    model.draws.begin(6, CPU)
    assert not torch.equal(model(TOKENS), first)
    model.draws.begin(5, CPU)
    assert torch.equal(model(TOKENS), first)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_belongs_to_a_piece(name: str):
    for options in ({}, {"positions": "relative"}, {"embedding_norm": True}, {"tied": False}):
        model = made(name, **options)
        needs = tuple(f"{need}." for piece in model.pieces() for need in piece.needs)
        assert all(parameter.startswith(needs) for parameter, _ in model.named_parameters())
