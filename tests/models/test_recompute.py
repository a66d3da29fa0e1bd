"""Computing activations again in backward: the same gradients, from less memory.

Gradients are equal bit for bit on the CPU in eager mode: the same operations on the same numbers, dropout's included.
"""

import copy
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.recompute import AnyBlock, RecomputeOptions, use_recompute
from hvdtrain.models.seq2seq import Seq2Seq

ROWS, POSITIONS, WIDTH, LAYERS = 3, 24, 32, 3
KINDS = [Decoder, Classifier, Seq2Seq]
LENGTHS = torch.tensor([24, 9, 1])
SEGMENTS = torch.tensor([[0] * 6 + [1] * 15 + [-1] * 3, [0] * 24, [0] * 2 + [1] * 9 + [2] * 13])


def tokens_of(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.randint(0, 50, (rows, POSITIONS), generator=torch.Generator().manual_seed(seed))


def build(kind: type, name: str = "none", every: int = 1, **options) -> torch.nn.Module:
    sizes = {"layers": LAYERS, "heads": 4, "width": WIDTH, "context": POSITIONS, **options}
    model = kind(TransformerOptions(**sizes), 50, *((3,) if kind is Classifier else ()))
    model.initialise(0)
    use_recompute(model, RecomputeOptions(name=name, every=every))
    return model


def run(model: torch.nn.Module, packed: bool = False, rows: int = ROWS) -> torch.Tensor:
    if isinstance(model, Decoder):
        return model(tokens_of(rows=rows), segments_BT=SEGMENTS if packed else None)
    if isinstance(model, Classifier):
        return model(tokens_of(), LENGTHS)
    return model(tokens_of(), LENGTHS, tokens_of(1))


def gradients(model: torch.nn.Module, packed: bool = False, bf16: bool = False) -> list[torch.Tensor]:
    """And the output, and a number drawn afterwards: what comes later draws the same numbers, too."""
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        out = run(model, packed)
    grads = torch.autograd.grad(out.float().square().sum(), list(model.parameters()))
    return [out.detach(), *grads, torch.rand(3)]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(("name", "every"), [("full", 1), ("full", 2), ("selective", 1), ("selective", 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_bits(kind: type, name: str, every: int, dropout: float, bf16: bool):
    expected = gradients(build(kind, dropout=dropout), bf16=bf16)
    found = gradients(build(kind, name, every, dropout=dropout), bf16=bf16)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["full", "selective"])
@pytest.mark.parametrize("positions", ["rotary", "relative"])
@pytest.mark.parametrize(("packed", "window"), [(True, 0), (False, 5), (True, 5)])
def test_with_documents_windows_and_shared_heads(name: str, packed: bool, window: int, positions: str):
    options = {"kv_heads": 2, "window": window, "dropout": 0.2, "positions": positions, "activation": "swiglu"}
    expected = gradients(build(Decoder, **options), packed)
    assert all(map(torch.equal, gradients(build(Decoder, name, **options), packed), expected))


class Calls(TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.of[op.name().removeprefix("aten::").removesuffix(".Tensor")] += 1
        return op(*args, **(kwargs or {}))


def calls_in_backward(name: str, every: int = 1) -> Counter[str]:
    total = run(build(Decoder, name, every)).square().sum()
    with Calls() as calls:
        total.backward()
    return calls.of


def test_what_is_computed_again():
    """A block of the decoder: four linear layers, two norms, a GELU. The last product's output is nobody's input."""
    none, full, selective = (calls_in_backward(name) for name in ("none", "full", "selective"))
    assert none["addmm"] == none["gelu"] == 0
    assert full["addmm"] == 3 * LAYERS
    assert full["gelu"] == selective["gelu"] == LAYERS
    assert full["native_layer_norm"] - none["native_layer_norm"] == 2 * LAYERS
    assert selective["native_layer_norm"] - none["native_layer_norm"] == 2 * LAYERS
    assert selective["addmm"] == 0
    attention = [name for name in full if "scaled_dot_product" in name and "backward" not in name]
    for name in attention:  # absent where attention is made of plain products
        assert (none[name], full[name], selective[name]) == (0, LAYERS, 0)


def test_scores_of_attention_made_of_plain_products_are_not_kept():
    """Q K^T is larger than its factors and is computed again; its product with the values is kept."""
    with sdpa_kernel(SDPBackend.MATH):
        none, full, selective = (calls_in_backward(name) for name in ("none", "full", "selective"))
    assert [calls["baddbmm"] - none["baddbmm"] for calls in (full, selective)] == [LAYERS, LAYERS]  # Q K^T and a mask
    assert [calls["bmm"] - none["bmm"] for calls in (full, selective)] == [LAYERS, 0]


def test_every_nth_block():
    assert calls_in_backward("full", every=2)["gelu"] == 2  # the first and the third of three
    assert calls_in_backward("full", every=3)["gelu"] == 1
    assert calls_in_backward("selective", every=9)["gelu"] == 1
    model = build(Seq2Seq, "full", every=2, encoder_layers=2)
    stacks = ([block.recompute for block in stack] for stack in (model.encoder_blocks, model.blocks))
    assert list(stacks) == [["full", "none"], ["full", "none", "full"]]
    use_recompute(model, RecomputeOptions())
    assert {m.recompute for m in model.modules() if isinstance(m, AnyBlock)} == {"none"}


def saved_bytes(model: torch.nn.Module) -> int:
    """What autograd keeps from forward to backward, parameters apart, each memory once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(model, rows=16)
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def test_saved_tensors_shrink_to_the_blocks_inputs():
    residual = 16 * POSITIONS * WIDTH * 4  # bytes of one [B, T, D]
    none, full = (saved_bytes(build(Decoder, name, dropout=0.1)) for name in ("none", "full"))
    # One input a block, the last norm's; the embedding's dropout mask (fp32 at most), tokens and two numbers a token.
    assert full < (LAYERS + 2.2) * residual
    assert none > 15 * LAYERS * residual
    assert full < saved_bytes(build(Decoder, "full", every=2, dropout=0.1)) < none


def live_bytes(name: str, every: int = 1) -> int:
    """What forward has allocated and not given back, by the allocator's account: kept outputs count, hooked or not."""
    model = build(Decoder, name, every, dropout=0.1)
    run(model, rows=16).sum().backward()  # whatever is made once is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = run(model, rows=16)
    assert out.requires_grad
    return sum(event.self_cpu_memory_usage for event in record.key_averages())


def test_less_memory_is_live_after_forward():
    none, selective, full = (live_bytes(name) for name in ("none", "selective", "full"))
    assert full < 0.25 * none
    assert full < 0.5 * selective
    assert selective < 0.75 * none
    assert selective < live_bytes("selective", every=2) < none


@pytest.mark.parametrize("name", ["full", "selective"])
def test_it_is_off_where_nothing_is_derived(name: str, monkeypatch: pytest.MonkeyPatch):
    def never(*_, **__):
        raise AssertionError("checkpointed")

    model, reference = build(Decoder, name), build(Decoder)
    expected = reference.eval()(tokens_of())
    monkeypatch.setattr("hvdtrain.models.recompute.checkpoint", never)
    with pytest.raises(AssertionError, match="checkpointed"):
        run(model)
    with torch.no_grad():
        run(model)
    model.eval()
    assert torch.equal(run(model), expected)
    cache = model.new_cache()
    with torch.no_grad():
        pieces = [model.decode(tokens_of()[:, :9], cache)]
        pieces += [model.decode(tokens_of()[:, t : t + 1], cache) for t in range(9, 24)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert model.train().decode(tokens_of(), model.new_cache()).shape == expected.shape  # training forgotten on


def test_a_copy_recomputes_as_well():
    model = copy.deepcopy(build(Decoder, "full", every=2))
    assert [block.recompute for block in model.blocks] == ["full", "none", "full"]


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "model"])
@pytest.mark.parametrize("name", ["full", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_under_torch_compile(name: str, whole: bool, dropout: float):
    """Graphs with recomputation in them, run by torch's own kernels: what Inductor makes of them is slow to test.

    Dropout draws the same numbers for forward and backward; a graph may draw other ones than eager mode.
    """
    grads = []
    for how in ("none", name):
        torch._dynamo.reset()
        model = build(Decoder, how, dropout=dropout, kv_heads=2, window=5)
        for module in [model] if whole else model.blocks:
            module.compile(backend="aot_eager", fullgraph=True)
        grads.append(gradients(model))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own
@pytest.mark.parametrize("name", ["none", "full", "selective"])
def test_packed_rows_under_torch_compile(name: str):
    """Other documents in each batch: attention over them stays outside of the graphs, which are not made again."""
    torch._dynamo.reset()
    model, reference = build(Decoder, name), build(Decoder)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    alone = torch.arange(POSITIONS).expand(ROWS, -1)
    segments = [SEGMENTS, alone, SEGMENTS.flip(1), SEGMENTS // 2, alone // 3]  # 7, 72, 7, 5 and 24 documents
    for number, batch in enumerate(segments):
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        outs = [m(tokens_of(), segments_BT=batch) for m in (model, reference)]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
        grads = [
            torch.autograd.grad(out.square().sum(), list(m.parameters()))
            for out, m in zip(outs, (model, reference), strict=True)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        # The second batch has taught it that the number of documents varies.
        assert number < 2 or torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_options():
    assert RecomputeOptions() == RecomputeOptions(name="none", every=1)
    with pytest.raises(ValidationError, match="'none', 'full' or 'selective'"):
        RecomputeOptions(name="some")
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        RecomputeOptions(every=0)
