"""``kv_heads`` and ``window`` in whole models: each is a plain model with copied weights, or with a mask by hand.

Tolerances: fp32, where attention adds in another order, through two or three layers.
"""

import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_decoder

from hvdtrain.errors import ConfigError
from hvdtrain.models import decoder as decoder_file
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.masks import window_mask
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
SIZES = {"layers": 2, "heads": 4, "width": 16, "context": 20, "ff_ratio": 2.0}
KINDS = [Decoder, Classifier, Seq2Seq]
LENGTHS = torch.tensor([20, 7, 1])
SEGMENTS = torch.tensor([[0] * 6 + [1] * 11 + [-1] * 3, [0] * 20, [0] * 2 + [1] * 9 + [2] * 9])
POSITIONS = torch.tensor([[*range(6), *range(11), 0, 0, 0], [*range(20)], [*range(2), *range(9), *range(9)]])


def tokens_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def build(kind: type, **options) -> torch.nn.Module:
    """Weights of the size that training gives them: at the start attention is nearly even, and would hide much."""
    more = (3,) if kind is Classifier else ()
    model = kind(TransformerOptions(**{**SIZES, **options}), 50, *more)
    model.initialise(0)
    for parameter in model.parameters():
        parameter.mul_(8 if parameter.dim() > 1 else 1)
        if parameter.dim() == 1:
            parameter.add_(torch.linspace(-0.2, 0.2, len(parameter)))
    return model


def run(model: torch.nn.Module) -> torch.Tensor:
    if isinstance(model, Decoder):
        return model(tokens_of())
    if isinstance(model, Classifier):
        return model(tokens_of(), LENGTHS)
    return model(tokens_of(), LENGTHS, tokens_of(1))


def spread(name: str, tensor: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """A weight or bias of shared keys and values as one of a model with as many heads as queries: rows repeated."""
    parts = {"attention.qkv": 2, "cross_attention.kv": 2}
    if not any(f"{part}." in name for part in parts):
        return tensor
    split = tensor.split([len(tensor) - 2 * kv_heads * 4, 2 * kv_heads * 4]) if ".qkv." in name else (None, tensor)
    repeated = split[1].unflatten(0, (2, kv_heads, 4)).repeat_interleave(4 // kv_heads, dim=1).flatten(0, 2)
    return repeated if split[0] is None else torch.cat([split[0], repeated])


@pytest.mark.parametrize("positions", ["learned", "rotary", "relative"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_heads_are_plain_heads_with_equal_weights(kind: type, kv_heads: int, positions: str):
    """Outputs; and the gradient of a shared weight is the sum of those of its copies."""
    shared, full = build(kind, kv_heads=kv_heads, positions=positions), build(kind, positions=positions)
    full.load_state_dict({name: spread(name, tensor, kv_heads) for name, tensor in shared.state_dict().items()})
    outs = [run(model) for model in (shared, full)]
    torch.testing.assert_close(*outs, **CLOSE)
    upstream = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1))
    for out in outs:
        (out * upstream).sum().backward()
    theirs = dict(full.named_parameters())
    for name, parameter in shared.named_parameters():
        # d/dw of f(copies of w) by the chain rule, through ``spread`` itself
        copied = parameter.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(spread(name, copied, kv_heads), copied, theirs[name].grad)
        assert torch.linalg.norm(parameter.grad - expected) <= 1e-5 * torch.linalg.norm(expected) + 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_key_heads_as_heads_is_the_default(kind: type):
    default, same = build(kind), build(kind, kv_heads=4)
    assert list(default.state_dict()) == list(same.state_dict())
    assert all(map(torch.equal, default.state_dict().values(), same.state_dict().values()))
    assert torch.equal(run(default), run(same))


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3, 7, 19, 20, 50])
def test_a_window_is_a_mask(window: int):
    model, full = build(Decoder, window=window).eval(), build(Decoder).eval()
    x = full.embed(tokens_of())
    for block in full.blocks:
        x = block(x, mask=window_mask(20, window, x.device))
    torch.testing.assert_close(model(tokens_of()), full.norm(x), **CLOSE)
    assert window >= 20 or not torch.allclose(model(tokens_of()), full(tokens_of()), atol=1e-2)


@torch.no_grad()
def test_one_layer_sees_its_window_and_nothing_before():
    model = build(Decoder, layers=1, window=4).eval()
    hidden = model(tokens_of())
    for position in (0, 5, 19):
        changed = tokens_of()
        changed[:, position] = (changed[:, position] + 1) % 50
        moved = (model(changed) != hidden).any(-1).all(0)
        assert moved.nonzero().squeeze(1).tolist() == list(range(position, min(position + 4, 20)))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize(("kv_heads", "window"), [(2, 0), (0, 5), (1, 3), (2, 1)])
@pytest.mark.parametrize("prefix", [1, 4, 12])
def test_decoding_with_the_cache(kv_heads: int, window: int, positions: str, prefix: int):
    model = build(Decoder, kv_heads=kv_heads, window=window, positions=positions).eval()
    cache = model.new_cache()
    pieces = [model.decode(tokens_of()[:, :prefix], cache)]
    pieces += [model.decode(tokens_of()[:, t : t + 1], cache) for t in range(prefix, 20)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens_of()), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 9])
def test_decoding_an_encoder_decoder_with_the_cache(prefix: int):
    model = build(Seq2Seq, kv_heads=2, window=5).eval()
    tokens, cache = tokens_of(1), model.new_cache()
    model.read(tokens_of(), LENGTHS, cache)
    pieces = [model.decode(tokens[:, :prefix], cache)]
    pieces += [model.decode(tokens[:, t : t + 1], cache) for t in range(prefix, 20)]
    assert cache.memory.shape == (2, 2, 3, 2, 20, 4)
    full = run(model)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, **CLOSE)
    assert not torch.allclose(full, run(build(Seq2Seq, kv_heads=2).eval()), atol=1e-2)  # the window matters


@pytest.mark.parametrize("by_mask", [False, True], ids=["runs", "mask"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize(("kv_heads", "window"), [(0, 0), (2, 0), (2, 3), (0, 8)])
def test_packed_documents(kv_heads: int, window: int, positions: str, by_mask: bool, monkeypatch: pytest.MonkeyPatch):
    """Each is as if alone, in values and gradients, also by the mask of devices where runs do not fit."""
    if by_mask:
        monkeypatch.setattr(decoder_file, "runs_fit", lambda *_: False)
    model = build(Decoder, kv_heads=kv_heads, window=window, positions=positions)
    rows, parameters = tokens_of(), list(model.parameters())
    hidden = model(rows, positions_BT=POSITIONS, segments_BT=SEGMENTS)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    documents = [(0, 0, 6), (0, 6, 17), (1, 0, 20), (2, 0, 2), (2, 2, 11), (2, 11, 20)]
    apart, together = 0.0, 0.0
    for row, begin, end in documents:
        alone = model(rows[row : row + 1, begin:end])[0]
        torch.testing.assert_close(hidden[row, begin:end], alone, **CLOSE)
        apart = apart + (alone * upstream[row, begin:end]).sum()
        together = together + (hidden[row, begin:end] * upstream[row, begin:end]).sum()
    grads = [torch.autograd.grad(total, parameters) for total in (together, apart)]
    for (name, _), a, b in zip(model.named_parameters(), *grads, strict=True):
        assert torch.linalg.norm(a - b) <= 1e-5 * torch.linalg.norm(b) + 1e-6, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"heads": 4, "kv_heads": 8}, "kv_heads=8 does not divide heads=4"),
        ({"kv_heads": -1}, "greater than or equal to 0"),
        ({"window": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_options(options: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        TransformerOptions(**options)


def test_an_encoder_has_no_window():
    with pytest.raises(ConfigError, match=r"model\.window=3: an encoder's positions see the whole row; set it to 0"):
        Classifier(TransformerOptions(window=3), 50, 3)


def test_options_left_alone_make_the_model_of_before():
    """Digits of the commit before kv_heads and window; weights exact, states as fp32 products allow."""
    model = tiny_decoder()
    qkv = [p.double().square().sum().item() for name, p in model.named_parameters() if "qkv.weight" in name]
    assert qkv == pytest.approx([0.3174983857122724, 0.28364044549771317], rel=1e-12)
    assert model(tokens_of()[:, :8]).double().abs().sum().item() == pytest.approx(307.7225319999052, rel=1e-5)
