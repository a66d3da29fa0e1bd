"""The contract of a task: which shards it reads and how, which model it trains, how a batch becomes a loss, and how
sums become scores.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import nn

from hvdtrain.data.batch import AnyBatch
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import Feed, Source
from hvdtrain.data.sampler import even_parts
from hvdtrain.data.shards import Manifest
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.options import TransformerOptions
from hvdtrain.options import Options
from hvdtrain.tasks.answers import Answers, Asked, Predictions

Model = TypeVar("Model", bound=nn.Module)
Read = TypeVar("Read", bound=AnyBatch)


@dataclass(frozen=True)
class LossSum:
    """``total``: a scalar tensor, the SUM of the loss over the batch's targets. ``weight``: how many there were.

    Sums, never means: they are added over microbatches and ranks and divided once, so that padding, uneven ranks and
    accumulation cannot bias the gradient.
    """

    total: torch.Tensor
    weight: int


@dataclass(frozen=True)
class Training:
    """What a run reads. ``about``: one line for the user: how much there is, how large a step is.

    ``longest_row``: the most tokens of a row, where rows have lengths of their own; 0: model.context.
    """

    source: Source
    about: str
    longest_row: int = 0


@dataclass(frozen=True)
class Evaluation:
    """This rank's part of a split: called, it gives batch after batch, about ``count`` of them.

    signatures: of scores that need one to be compared with others', by their names.
    """

    batches: Callable[[], Iterator[AnyBatch]]
    count: int
    signatures: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, batches: Callable[[], Iterator[AnyBatch]], split_rows: int, rows: int, feed: Feed) -> "Evaluation":
        """split_rows: of the whole split; rows: of a batch."""
        return cls(batches, -(-even_parts(split_rows, feed.size)[feed.rank][1] // rows))

    def __call__(self) -> Iterator[AnyBatch]:
        return self.batches()


class Task(Protocol[Model, Read]):
    """What a run needs to know of a task, for its kind of model and its kind of batch.

    name, about        what ``task.name`` calls it, and what it does, for --help
    options            its own settings, which lie under its name
    kind               of the shards that it reads
    rows_are_alike     each row has model.context positions, so that ranks share a batch in whole rows; else rows have
                       lengths of their own
    rows_are_packed    a row holds whole documents, and padding where none fits
    predicts_tokens    its loss is ``linear_cross_entropy`` over the vocabulary
    input_field        where JSON lines have the text that its model answers
    compares_texts     what its model answers can be compared with references
    """

    name: ClassVar[str]
    about: ClassVar[str]
    options: ClassVar[type[Options]]
    kind: ClassVar[str]
    rows_are_alike: ClassVar[bool] = False
    rows_are_packed: bool = False
    predicts_tokens: ClassVar[bool] = False
    input_field: ClassVar[str] = "text"
    compares_texts: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        """options: of its own kind, see above."""

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> Model:
        """The model, not yet initialised; it has ``initialise(seed)``."""

    def check(self, corpora: Corpora, feed: Feed) -> None:
        """What the manifests alone can tell, before a run reads the shards. Errors: DataError, ConfigError."""

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        """The training split of what was checked. Errors: DataError, ConfigError where it does not fit the run."""

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        """A split of the task's kind, ``rows`` rows a batch. Errors: DataError where there is nothing to score."""

    def inputs(self, batch: Read) -> tuple[torch.Tensor | None, ...]:
        """What the model's ``forward`` takes of a batch, in its order."""

    def loss(self, model: Model, output: torch.Tensor, batch: Read) -> LossSum:
        """Loss of one microbatch; called under autograd. output: the model's, of ``inputs(batch)``."""

    def training_flops(self, model: Model, batch: Read) -> int:
        """Model FLOPs of forward and backward over one microbatch (local; waits for no device); see models/flops.py.
        0: nobody has counted this model's products.
        """
        return 0

    def measure(self, model: Model, output: torch.Tensor, batch: Read) -> torch.Tensor:
        """Sums over one batch in evaluation: fp64 [k], the same k for every batch; called without autograd."""

    def measure_decoded(self, model: Model, batch: Read) -> torch.Tensor | None:
        """More such sums, of what the model answers token by token; None: the task asks for none."""
        return None

    def scores(self, sums: list[float]) -> dict[str, float]:
        """Scores of a whole split from its global sums; ``val_loss`` (nats per target) is always among them."""

    def directions(self) -> Mapping[str, int]:
        """The scores that tell a better model from a worse one: 1 where more is better, -1 where less is."""
        return {"val_loss": -1}

    # What those ask who use a trained model:

    def scored_by(self, scores: str, given: Mapping[str, Any]) -> Self:
        """Itself, with evaluations that also decode and compare with references. scores: names of ``SCORES``; none:
        its own. given: settings of the search. Errors: ConfigError where it compares no texts, or not so.
        """
        if scores or given:
            raise ConfigError(f"task.name={self.name} compares no texts with references, which --scores and --beam ask")
        return self

    def answers(self, asked: Asked) -> Answers:
        """How its model answers texts. Errors: ConfigError where it answers none, or not so."""
        raise ConfigError(f"task.name={self.name} answers no texts; `evaluate` scores it on a split")

    def predictions(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Predictions:
        """How its model answers the questions of a split, ``rows`` windows a batch. Errors: DataError, ConfigError."""
        raise ConfigError(f"task.name={self.name}: its splits hold no questions to answer; give --input FILE")

    # What the planner asks, which has no data:

    def example(self, rows: int, positions: int) -> Read:
        """A batch of training, of rows that are all of ``positions`` tokens 0, on torch's present device.

        By its sizes: ``zeros_like`` on the meta device, where batches are counted, loads torch's symbolic algebra.
        """

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        """What the loader holds of a rank that takes ``rows`` of ``positions`` tokens a step.

        steps_per_epoch: None: not known.
        """


def run(model: nn.Module, inputs: Sequence[torch.Tensor | None], rows_at_once: int) -> torch.Tensor:
    """The model's output, of so many rows at once; 0: all."""
    outputs = [model(*part) for part in parts_of(inputs, rows_at_once)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def parts_of(inputs: Sequence[torch.Tensor | None], rows_at_once: int) -> Iterator[Sequence[torch.Tensor | None]]:
    """A model's inputs, so many rows after so many; 0: all at once."""
    if not rows_at_once:
        yield inputs
        return
    first = next(tensor for tensor in inputs if tensor is not None)
    for begin in range(0, len(first), rows_at_once):
        yield [None if tensor is None else tensor[begin : begin + rows_at_once] for tensor in inputs]


COMMAND_OF = {"qa": "labels"}  # of data_prep, which makes shards of a kind; else of the kind's own name


def check_kind(corpora: Corpora, task: Task[Any, Any]) -> None:
    """Errors: DataError where the shards are of another kind than the task reads."""
    kind = corpora.manifest.kind
    if kind != task.kind:
        raise DataError(
            f"task.name={task.name} reads shards of kind {task.kind}, but {corpora.names} has kind {kind}; "
            f"make them with `python -m data_prep {COMMAND_OF.get(task.kind, task.kind)}`, or choose another task.name"
        )


def check_val(corpora: Corpora, split: str) -> None:
    """Errors: DataError where ``split`` is that for validation and a folder lacks it."""
    for folder, manifest in corpora.entries:
        if split == "val" and not manifest.split("val"):
            raise DataError(
                f"{folder} has no val shards; prepare it again with a larger --val-fraction, or with validation input"
            )
