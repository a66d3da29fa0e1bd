"""Small models in a pipeline, and whole: what the tests on threads and those under MPI compare."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import Mesh, whole_replicas
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint, fill_slices
from hvdtrain.cut.cut import Replica
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.batch import Batch, MaskedBatch, PairBatch
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import MaskedLanguageModel
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.recompute import RecomputeOptions, use_recompute
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.tasks.lm import LanguageModel
from hvdtrain.tasks.mlm import MaskedText, MaskedTextOptions
from hvdtrain.tasks.seq2seq import Seq2SeqOptions, SequenceToSequence

VOCAB, ROWS, CONTEXT = 96, 2, 36  # hidden states of 9,216 bytes: below 8,192 MPI sends at once, and no deadlock shows
CPU = torch.device("cpu")


def tokens(seed: int, positions: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (ROWS, positions), generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> Batch:
    windows = tokens(seed, CONTEXT + 1)
    return Batch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), ROWS * CONTEXT)


def masked(seed: int) -> MaskedBatch:
    told = tokens(seed, CONTEXT)
    places = torch.arange(seed % 3, ROWS * CONTEXT, 5)
    return MaskedBatch(told, torch.tensor([CONTEXT, 20]), places, told.flatten()[places], len(places))


def pair(seed: int) -> PairBatch:
    """Of another length for each third seed, as buckets by length have them."""
    source, target = tokens(seed, 20 + seed % 3), tokens(seed + 100, CONTEXT + 1)
    lengths, positions = torch.tensor([20, 7]), CONTEXT
    return PairBatch(source, lengths, target[:, :-1].contiguous(), target[:, 1:].contiguous(), ROWS * positions)


TASKS: dict[str, tuple[Callable[..., Any], Any, Callable[[int], Any]]] = {
    "decoder": (Decoder, LanguageModel(), text),
    "encoder": (MaskedLanguageModel, MaskedText(MaskedTextOptions()), masked),
    "seq2seq": (Seq2Seq, SequenceToSequence(Seq2SeqOptions()), pair),
}
ALONE = whole_replicas(LocalGroup())


def made(
    name: str, mesh: Mesh = ALONE, cut: CutOptions | None = None, precision: str = "fp32", compile: str = "none",
    recompute: str = "none", **options: Any,
) -> Replica:  # fmt: skip
    """A replica with the weights of step 0."""
    kind, task, _ = TASKS[name]
    small = {"layers": 2, "heads": 2, "width": 32, "context": CONTEXT, "positions": "relative", **options}

    def model() -> Any:
        whole = kind(TransformerOptions(**small), VOCAB)
        use_recompute(whole, RecomputeOptions(name=recompute))
        return whole

    blueprint = Blueprint(model)
    replica = make_replica(blueprint, Making(mesh, PRECISIONS[precision], CPU, task, cut or CutOptions(), compile))
    fill_slices(replica.slices, blueprint.initial(1))
    replica.publish()
    return replica


def batches(name: str, count: int) -> list[Any]:
    return [TASKS[name][2](seed) for seed in range(count)]


def gradients(replica: Replica, name: str, count: int, scale: float | None = None) -> dict[str, torch.Tensor]:
    """Of a step of so many microbatches, by the slices' names; the loss of the step beside them."""
    loss_scale = None if scale is None else torch.tensor(scale)
    passed = replica.forward_backward(batches(name, count), TASKS[name][1], seed=7, loss_scale=loss_scale)
    assert passed.weights == [batch.target_tokens for batch in batches(name, count)]
    found = {piece.name: used.grad.float() for piece, used in zip(replica.slices, replica.computing, strict=True)}
    return {**found, "loss": passed.loss}


def added_up(of_ranks: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of the ranks that hold a tensor add up; the loss is told to all."""
    found: dict[str, torch.Tensor] = {}
    for of_rank in of_ranks:
        assert of_rank["loss"] == of_ranks[0]["loss"]
        for name, tensor in of_rank.items():
            found[name] = found[name] + tensor if name in found and name != "loss" else tensor
    return found


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """|found - expected| / |expected| of the tensor in which they differ most, and its name."""
    assert found.keys() == expected.keys()
    return max((float((found[name] - expected[name]).norm() / expected[name].norm()), name) for name in expected)
