"""Classification and sentiment: tell a text's label, or its labels, of one text or of two."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import field_validator
from torch.nn.utils.rnn import pad_sequence

from hvdtrain.data.batch import IGNORE, LabelBatch
from hvdtrain.data.bucketed import LabelledTexts, eval_rows, types_of
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.records import Records
from hvdtrain.data.shards import Manifest, frame_tokens
from hvdtrain.errors import ConfigError
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.options import TransformerOptions
from hvdtrain.options import Options, option
from hvdtrain.tasks.answers import Answer, Asked, Row, refuse_given
from hvdtrain.tasks.label_scores import label_scores, label_sums
from hvdtrain.tasks.rows import bucketed_training, check_one_folder, open_records
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training


class ClassifyOptions(Options):
    label_smoothing: float = option(0.0, "share of the label's probability spread over all labels", ge=0, lt=1)
    class_weights: Literal["none", "balanced"] | list[float] = option(
        "none",
        "what a label's loss counts in training: balanced: each label as much as the others together; or a weight for "
        "each, in the order of the manifest's label_names. Of texts with several labels: of those that a text has",
    )
    threshold: float = option(
        0.5, "of texts with several labels: those of this probability or more are told", gt=0, lt=1
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _are_weights(cls, given: Any) -> Any:
        is_list = isinstance(given, list) and all(type(one) in (int, float) and 0 <= one < math.inf for one in given)
        if given in ("none", "balanced") or (is_list and any(given)):
            return given
        raise ValueError(
            f"{given!r} is neither none nor balanced, nor a list of a weight for each label, like [1, 2.5, 1], all of "
            "them 0 or more and one above 0"
        )


class Classification(Task[Classifier, LabelBatch]):
    """Cross-entropy of a text's label, in nats, summed over texts; where a text may have several, binary cross-entropy
    of each label, summed over texts and labels.
    """

    name = "classify"
    about = "a text's label"
    options = ClassifyOptions
    kind = "labels"

    def __init__(self, options: ClassifyOptions):
        self._options = options

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> Classifier:
        return Classifier(options, manifest.vocab_size, len(manifest.label_names), manifest.has_several_labels)

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_one_folder(corpora, self)
        given, names = self._options.class_weights, corpora.manifest.label_names
        if not isinstance(given, str) and len(given) != len(names):
            raise ConfigError(
                f"task.classify.class_weights has {len(given)} weights, but {corpora.names} has {len(names)} labels; "
                f"give one for each of: {', '.join(names)}"
            )

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        records = open_records(corpora, "train")
        weights = class_weights(self._options.class_weights, records, corpora.manifest)
        return bucketed_training(records, feed, _texts(corpora.manifest, feed, weights), "texts")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        records, make_batch = open_records(corpora, split), _texts(corpora.manifest, feed)
        batches = partial(eval_rows, records, rows, feed.rank, feed.size, make_batch)
        return Evaluation.of(batches, len(records.lengths), rows, feed)

    def inputs(self, batch: LabelBatch) -> tuple[torch.Tensor | None, ...]:
        return batch.tokens, batch.lengths, batch.types

    def loss(self, model: Classifier, output: torch.Tensor, batch: LabelBatch) -> LossSum:
        losses = cross_entropy(output.float(), batch.labels, self._options.label_smoothing)
        total = losses.sum() if batch.weights is None else (losses * batch.weights).sum()
        return LossSum(total, batch.target_tokens)

    def training_flops(self, model: Classifier, batch: LabelBatch) -> int:
        return model.training_flops(batch.tokens.shape)

    def measure(self, model: Classifier, output: torch.Tensor, batch: LabelBatch) -> torch.Tensor:
        logits = output.float()
        loss = cross_entropy(logits, batch.labels, 0.0).sum()
        counted = batch.labels != IGNORE
        classes = torch.arange(logits.shape[-1], device=logits.device)
        if batch.labels.dim() == 2:
            truth = batch.labels == 1
            guess = counted & (logits.sigmoid() >= self._options.threshold)
        else:
            truth = batch.labels[:, None] == classes  # IGNORE is no class
            guess = counted[:, None] & (logits.argmax(-1)[:, None] == classes)
        return label_sums(loss, counted, truth, guess)

    def scores(self, sums: list[float]) -> dict[str, float]:
        return label_scores(sums)

    def answers(self, asked: Asked) -> "Labels":
        refuse_given(asked.given, self.name)
        return Labels(asked, self._options.threshold)

    def directions(self) -> Mapping[str, int]:
        return {"val_loss": -1, "accuracy": 1, "macro_f1": 1}

    def example(self, rows: int, positions: int) -> LabelBatch:
        tokens, types = (torch.zeros(rows, positions, dtype=torch.int64) for _ in range(2))
        labels = torch.zeros(rows, dtype=torch.int64)
        return LabelBatch(tokens, torch.full((rows,), positions), types, labels, rows)

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        # the texts of a batch and their types; of each text its length and its turn
        return BUFFERS * 2 * 8 * rows * positions + 12 * facts.documents


def _texts(manifest: Manifest, feed: Feed, weights: np.ndarray | None = None) -> LabelledTexts:
    special = manifest.special_tokens
    last = frame_tokens(special)[1] if special else -1  # nobody's: then each text is one
    return LabelledTexts(feed.context, last, len(manifest.label_names) * manifest.has_several_labels, weights)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Of each label that counts, in nats: fp32, shaped like ``labels`` ([B], or [B, C] where each is yes or no)."""
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)
    targets = (labels == 1).float() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * (labels != IGNORE)


def class_weights(
    asked: Literal["none", "balanced"] | Sequence[float], records: Records, manifest: Manifest
) -> np.ndarray | None:
    """A weight for each label: fp32 [C]; None: all count alike.

    Balanced: texts / (labels x texts of the label), so that the weights of all texts have the mean 1 (scikit-learn's
    rule); where a text may have several, texts without the label / texts with it.
    """
    if asked == "none":
        return None
    if asked != "balanced":
        return np.array(asked, np.float32)
    classes, texts = len(manifest.label_names), len(records)
    parts = [shard["labels"] for _, shard in records.shards]
    having = sum(np.bincount(part[0 : len(part)], minlength=classes) for part in parts)
    others = texts - having if manifest.has_several_labels else texts / classes
    return (others / np.maximum(having, 1)).astype(np.float32)  # a label without a text has nothing to weigh


class Labels:
    """Of each text, or two with a tab between them, all labels by their probability. See ``Answers``."""

    tokens_at_once = 8192

    def __init__(self, asked: Asked, threshold: float):
        self._asked, self._manifest, self._threshold = asked, asked.manifest, threshold
        self._first, self._last = frame_tokens(asked.manifest.special_tokens)
        self.room: int | None = asked.context

    def encode(self, text: str) -> list[int]:
        """``[cls] text [sep]``, and ``second [sep]``, as data_prep puts them into shards."""
        parts = [self._asked.encode(part) for part in text.split("\t")]
        return [self._first, *(token for part in parts for token in (*part, self._last))] if any(parts) else []

    def cut(self, tokens: list[int]) -> list[int]:
        return [*tokens[: self._asked.context - 1], self._last]

    @torch.no_grad()
    def answer(self, model: Classifier, rows: Sequence[Row]) -> list[list[Answer]]:
        device, several = next(model.parameters()).device, self._manifest.has_several_labels
        tokens = pad_sequence([torch.tensor(row.tokens) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row.tokens) for row in rows])
        types = torch.from_numpy(types_of(tokens.numpy(), lengths.numpy(), self._last))
        logits = model(tokens.to(device), lengths.to(device), types.to(device)).float().cpu()
        found = []
        for of_row in logits.sigmoid() if several else logits.softmax(-1):
            order = of_row.argsort(descending=True, stable=True).tolist()
            found.append([Answer(self._manifest.label_names[label], float(of_row[label])) for label in order])
        return found

    def line(self, answers: Sequence[Answer]) -> str:
        """The label and its probability; of several those from ``threshold`` on."""
        told = answers[:1]
        if self._manifest.has_several_labels:
            told = [one for one in answers if one.score >= self._threshold]
        return "\t".join(f"{one.text}\t{one.score:.4f}" for one in told)
