"""Model FLOPs against torch's own counter, on real forward and backward passes.

torch counts attention's products as if there were no mask. So a causal model is compared twice: exactly, with the count
of pairs replaced by all pairs; and the pairs by themselves, against a mask that is drawn and summed.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hvdtrain.models import flops
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier, Encoder, MaskedLanguageModel, SpanModel
from hvdtrain.models.frozen import freeze
from hvdtrain.models.lora import LoraOptions, adapt
from hvdtrain.models.masks import packed_mask
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq

SIZES = {"layers": 2, "heads": 4, "width": 32, "context": 24}
KINDS = [
    {},
    {"bias": False, "tied": False, "norm": "rmsnorm", "positions": "rotary"},
    {"activation": "swiglu", "ff_ratio": 3.3, "vocab_multiple": 64},
    {"layers": 3, "heads": 2, "encoder_layers": 1, "ff_ratio": 2.5},
    {"kv_heads": 2},
    {"kv_heads": 1, "bias": False},
    {"head_width": 12, "ff_width": 40, "activation": "geglu_tanh", "kv_heads": 2, "norm_first": False},
]
RELATIVE = {"positions": "relative", "attention_scale": False, "bias": False}
ROWS, POSITIONS, SOURCE, VOCABULARY, CLASSES = 3, 17, 11, 50, 5


def options_of(kind: dict) -> TransformerOptions:
    return TransformerOptions(**{**SIZES, **kind})


def counted(run) -> int:
    """FLOPs of ``run().sum().backward()`` as torch counts them.

    Without flash attention, whose products the counter does not know on the CPU, and which computes some twice.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run().sum().backward()
    return counter.get_total_flops()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal attention counted like torch does: as if each query met each key."""
    monkeypatch.setattr(flops, "visible_pairs", lambda positions, window=0: positions * positions)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("all_pairs")
def test_a_decoder(kind: dict):
    model = Decoder(options_of(kind), VOCABULARY)
    tokens = ids(ROWS, POSITIONS)
    assert model.training_flops(tokens.shape) == counted(lambda: model.logits(model(tokens)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_an_encoder_and_a_classifier(kind: dict):
    """Exactly: nothing is hidden from a query, and padding is multiplied too."""
    tokens, lengths = ids(ROWS, POSITIONS), torch.tensor([17, 1, 9])
    encoder = Encoder(options_of(kind), VOCABULARY)
    assert encoder.training_flops(tokens.shape) == counted(lambda: encoder(tokens, lengths))
    classifier = Classifier(options_of(kind), VOCABULARY, CLASSES)
    assert classifier.training_flops(tokens.shape) == counted(lambda: classifier(tokens, lengths))
    spans = SpanModel(options_of(kind), VOCABULARY)
    assert spans.training_flops(tokens.shape) == counted(lambda: spans(tokens, lengths))
    masked = MaskedLanguageModel(options_of(kind), VOCABULARY)
    expected = counted(lambda: masked.logits(masked(tokens, lengths).flatten(0, 1)[[3, 9, 17, 40]]))
    assert masked.training_flops(tokens.shape, 4) == expected


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("all_pairs")
def test_an_encoder_decoder(kind: dict):
    model = Seq2Seq(options_of(kind), VOCABULARY)
    source, lengths, tokens = ids(ROWS, SOURCE), torch.tensor([11, 2, 5]), ids(ROWS, POSITIONS)
    expected = counted(lambda: model.logits(model(source, lengths, tokens)))
    assert model.training_flops(source.shape, tokens.shape) == expected


@pytest.mark.parametrize(("positions", "window"), [(1, 0), (7, 0), (7, 1), (7, 3), (7, 7), (7, 100), (64, 16)])
def test_pairs_are_those_of_the_mask(positions: int, window: int):
    mask = torch.ones(positions, positions, dtype=torch.bool).tril()
    if window:
        mask = mask.triu(1 - window)
    assert flops.visible_pairs(positions, window) == int(mask.sum())


def test_a_causal_model_does_half_of_the_attention():
    """By exactly the pairs above the diagonal: 4 D FLOPs each, thrice, in every layer."""
    model = Decoder(options_of({}), VOCABULARY)
    ours = model.training_flops((ROWS, POSITIONS))
    theirs = counted(lambda: model.logits(model(ids(ROWS, POSITIONS))))
    hidden_pairs = ROWS * POSITIONS * (POSITIONS - 1) // 2
    assert theirs - ours == 3 * SIZES["layers"] * hidden_pairs * 4 * SIZES["width"]


def test_a_window_counts_for_less():
    """In a decoder, and in an encoder-decoder's decoder alone."""
    pairs = POSITIONS * (POSITIONS + 1) // 2 - (5 * POSITIONS - 10)  # of full rows 5, of the first four 1, 2, 3, 4
    less = 3 * SIZES["layers"] * ROWS * pairs * 4 * SIZES["width"]
    for kind, more in ((Decoder, []), (Seq2Seq, [(ROWS, SOURCE)])):
        whole, windowed = (
            kind(options_of({"window": window}), VOCABULARY).training_flops(*more, (ROWS, POSITIONS))
            for window in (0, 5)
        )
        assert whole - windowed == less


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_packed_documents_are_counted_by_themselves(window: int):
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [0, 1, 2, 2, 2, 2, 2, 2], [0] * 8])
    mask = packed_mask(segments)
    if window:
        mask = mask.triu(1 - window)
    pairs = int(mask.sum())
    assert flops.packed_pairs(segments, window) == pairs
    model = Decoder(options_of({"window": window}), VOCABULARY)
    packed = model.training_flops(segments.shape, segments_BT=segments)
    whole = model.training_flops(segments.shape)
    hidden_pairs = len(segments) * flops.visible_pairs(8, window) - pairs
    assert whole - packed == 3 * SIZES["layers"] * hidden_pairs * 4 * SIZES["width"]
    # Documents on a device would have to be waited for.
    assert model.training_flops(segments.shape, segments_BT=segments.to("meta")) == whole


def test_gpt2_small_by_the_papers_formula():
    """PaLM's 6 N + 12 L D T a token with half the attention; N without embeddings, biases and norms."""
    options = TransformerOptions(layers=12, heads=12, width=768, context=1024)
    matrices = 12 * 12 * 768**2 + 50304 * 768
    per_token = 6 * matrices + 6 * 12 * 768 * 1025
    assert flops.decoder_flops(options, 50304, 2, 1024) == 2 * 1024 * per_token


def test_a_compiled_model_is_looked_into():
    model = Decoder(options_of({}), VOCABULARY)
    compiled = torch.compile(model, backend="eager")  # which does nothing before the first call
    assert compiled.training_flops((2, 8)) == model.training_flops((2, 8))


FROZEN = {
    "nothing": {},
    "the lowest layers": {"which": 1},
    "the embedding, which is the head too": {"which": "*embedding.weight"},
    "matrices, but no biases and norms": {"which": "*embedding.weight,*attention.*.weight,*feed_forward.*.weight"},
    "weights between trained ones": {"which": "*feed_forward*,*qkv.weight"},
    "adapters": {"lora": LoraOptions(rank=3, targets="q,v")},
    "adapters behind trained norms": {"lora": LoraOptions(rank=2, targets="down", also="*norm*")},
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", [KINDS[0], {**KINDS[6], **RELATIVE}], ids=str)
@pytest.mark.usefixtures("all_pairs")
def test_what_is_frozen_is_multiplied_less_often(kind: dict, frozen: str):
    """Exactly by the products that autograd leaves out, in every kind of model."""
    options, how = options_of({**kind, "layers": 3}), {"which": "", "lora": None, **FROZEN[frozen]}
    tokens, lengths, source = ids(ROWS, POSITIONS), torch.tensor([17, 1, 9]), ids(ROWS, SOURCE)
    runs = {
        Decoder(options, VOCABULARY): ([tokens], []),
        Classifier(options, VOCABULARY, CLASSES): ([tokens, lengths], []),
        SpanModel(options, VOCABULARY): ([tokens, lengths], []),
        MaskedLanguageModel(options, VOCABULARY): ([tokens, lengths], [ROWS * POSITIONS]),
        Seq2Seq(options, VOCABULARY): ([source, torch.tensor([11, 2, 5]), tokens], []),
    }
    for model, (inputs, more) in runs.items():
        adapt(model, options, how["lora"])
        freeze(model, how["which"], how["lora"], scores_tokens=not isinstance(model, Classifier | SpanModel))
        shapes = [one.shape for one in inputs if one.dim() == 2]
        logits = getattr(model, "logits", lambda hidden: hidden)
        expected = counted(lambda model=model, inputs=inputs, logits=logits: logits(model(*inputs)))
        assert model.training_flops(*shapes, *more) == expected, type(model).__name__


@pytest.mark.usefixtures("all_pairs")
def test_a_frozen_encoder_gets_no_gradient_of_its_memory():
    """Though the layers that read it are trained, one after another."""
    model = Seq2Seq(options_of({"layers": 3}), VOCABULARY)
    freeze(model, "encoder*,embedding,position", None, scores_tokens=True)
    source, tokens = ids(ROWS, SOURCE), ids(ROWS, POSITIONS)
    expected = counted(lambda: model.logits(model(source, torch.tensor([11, 2, 5]), tokens)))
    assert model.training_flops(source.shape, tokens.shape) == expected
