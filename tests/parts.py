"""One microbatch of every kind of model, and what a model that is spread over parts makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from threads import on_ranks
from torch import nn

from hvdtrain.comm.axis import Axis
from hvdtrain.comm.mesh import MeshOptions, make_mesh
from hvdtrain.cut.blueprint import Blueprint, Placed, make_real
from hvdtrain.cut.tensor import spread
from hvdtrain.data.batch import IGNORE, AnyBatch, Batch, LabelBatch, MaskedBatch, PairBatch
from hvdtrain.data.spans import SpanBatch
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier, MaskedLanguageModel, SpanModel
from hvdtrain.models.frozen import freeze
from hvdtrain.models.initial import fill
from hvdtrain.models.lora import LoraOptions, adapt
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.recompute import RecomputeOptions, use_recompute
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.slices import whole_rect
from hvdtrain.tasks import TaskOptions, make_task

WORDS, ROWS = 51, 3  # words: neither 2 nor 4 divides them
KINDS: dict[str, Callable[..., Any]] = {
    "lm": Decoder,
    "classify": partial(Classifier, classes=3),
    "mlm": MaskedLanguageModel,
    "span_qa": SpanModel,
    "seq2seq": Seq2Seq,
}
SMALL = {"layers": 2, "heads": 4, "width": 32, "context": 16, "ff_ratio": 2.0}
SHORT_BIAS = {"relative_buckets": 8, "relative_distance": 16}

T = TypeVar("T")


def on_parts(parts: int, work: Callable[[Axis], T]) -> list[T]:
    """``work(axis)`` on each of the parts of a tensor axis, which are threads."""
    return on_ranks(parts, lambda group: work(make_mesh(group, MeshOptions(tensor=parts)).tensor))


@dataclass(frozen=True)
class Case:
    """A model of a task, and how it is spread. positions: of its longest row."""

    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: int = 2
    positions: int = 8
    sequence: bool = True
    lora: LoraOptions | None = None
    only_adapters: bool = False
    recompute: str = "none"

    def __str__(self) -> str:
        words = [self.task, *(f"{key}={value}" for key, value in self.options.items()), f"parts={self.parts}"]
        words += [f"positions={self.positions}"] if self.positions % self.parts else []
        words += [] if self.sequence else ["no-sequence"]
        return "-".join([*words, *(["lora"] if self.lora else [])])

    def make(self) -> Any:
        """The whole model; its weights are not set."""
        options = TransformerOptions(**{**SMALL, **self.options})
        model = KINDS[self.task](options, WORDS)
        adapt(model, options, self.lora)
        if self.only_adapters:
            freeze(model, "", self.lora, scores_tokens=True)
        use_recompute(model, RecomputeOptions(name=self.recompute))
        return model

    def whole(self, seed: int = 0, dtype: torch.dtype = torch.float64, factor: float = 3.0) -> Any:
        """With weights of the size that training gives: at the start attention is nearly even, and hides much."""
        model, generator = self.make(), torch.Generator().manual_seed(seed)
        fill(model, Blueprint(self.make).initial(seed))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor if parameter.dim() > 1 else 1)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype)

    def part(self, axis: Axis, whole: nn.Module) -> tuple[Any, Mapping[str, Placed]]:
        """This rank's part, with the weights of ``whole``; and where they lie there."""
        model = Blueprint(self.make).copy()
        placed = spread(model, axis, self.sequence, tell=lambda _: None)
        make_real(model, torch.device("cpu"))
        held = dict(whole.named_parameters(remove_duplicate=False))
        model.to(next(whole.parameters()).dtype).train()
        with torch.no_grad():
            for way, own in model.named_parameters(remove_duplicate=False):
                all_of = whole_rect(held[way].shape)
                own.copy_(torch.cat([held[way][place.index_in(all_of)] for place in placed[way].places]))
        return model, placed

    def loss(self, model: Any, seed: int = 0) -> torch.Tensor:
        task = make_task(TaskOptions(name=self.task))
        batch = batch_of(self.task, self.positions, seed)
        return task.loss(model, model(*task.inputs(batch)), batch).total


def batch_of(task: str, positions: int, seed: int = 0) -> AnyBatch:
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(WORDS, shape, generator=generator)

    rows, lengths = tokens(ROWS, positions), torch.tensor([positions, positions - 3, positions - 1])
    targets = tokens(ROWS, positions)
    targets[0, 2] = IGNORE
    if task == "lm":
        return Batch(rows, targets, ROWS * positions - 1)
    if task == "classify":
        return LabelBatch(rows, lengths, rows % 2, targets[:, 0] % 3, ROWS)
    if task == "mlm":
        return MaskedBatch(rows, lengths, torch.tensor([1, 3, 8, 17]), targets[1, :4], 4)
    if task == "span_qa":
        return SpanBatch(rows, lengths, rows % 2, torch.tensor([[1, 2], [0, 3], [2, 2]]), 2 * ROWS)
    source_lengths = torch.tensor([positions + 4, positions, 3])
    return PairBatch(tokens(ROWS, positions + 4), source_lengths, rows, targets, ROWS * positions - 1)


Graded = tuple[Mapping[str, torch.Tensor | None], Mapping[str, Placed]]


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def put_together(name: str, whole: torch.Size, parts: Sequence[Graded]) -> torch.Tensor:
    """A gradient of the whole model from those of its parts, as their placement says. Which are the same on all parts
    must be so to the bit.
    """
    first, (place, *_) = parts[0][0][name], [placed[name] for _, placed in parts]
    if place.copies > 1 and not place.is_partial:
        assert all(torch.equal(grads[name], first) for grads, _ in parts), f"{name} differs between the parts"
        return first
    found = first.new_zeros(whole)
    for grads, placed in parts:
        pieces = grads[name].split([rect.shape[0] for rect in placed[name].places])
        for piece, rect in zip(pieces, placed[name].places, strict=True):
            found[rect.index_in(whole_rect(whole))] += piece
    return found
