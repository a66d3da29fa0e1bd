"""Classification and sentiment: predict a text's label."""

from functools import partial

import torch
import torch.nn.functional as F

from hvdtrain.data.batch import IGNORE, LabelBatch
from hvdtrain.data.bucketed import MakeBatch, eval_rows, label_batch
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.records import Records
from hvdtrain.data.shards import Manifest
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.options import TransformerOptions
from hvdtrain.options import Options, option
from hvdtrain.tasks.rows import bucketed_training, check_one_folder, open_records
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training


class ClassifyOptions(Options):
    label_smoothing: float = option(0.0, "share of the label's probability spread over all labels", ge=0, lt=1)


class Classification(Task[Classifier, LabelBatch]):
    """Cross-entropy of the label, in nats, summed over rows. Scores: accuracy, and F1 as the mean over the labels."""

    name = "classify"
    about = "a text's label"
    options = ClassifyOptions
    kind = "labels"

    def __init__(self, options: ClassifyOptions):
        self._options = options

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> Classifier:
        return Classifier(options, manifest.vocab_size, len(manifest.label_names))

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_one_folder(corpora, self)

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        records, make_batch = self._open(corpora, "train", feed)
        return bucketed_training(records, feed, make_batch, "texts")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        records, make_batch = self._open(corpora, split, feed)
        batches = partial(eval_rows, records, rows, feed.rank, feed.size, make_batch)
        return Evaluation.of(batches, len(records.lengths), rows, feed)

    def _open(self, corpora: Corpora, split: str, feed: Feed) -> tuple[Records, MakeBatch]:
        records = open_records(corpora, split)
        return records, lambda records, rows: label_batch(records, rows, feed.context)

    def loss(self, model: Classifier, batch: LabelBatch) -> LossSum:
        total = self._cross_entropy(model(batch.tokens, batch.lengths), batch, self._options.label_smoothing)
        return LossSum(total, batch.target_tokens)

    def training_flops(self, model: Classifier, batch: LabelBatch) -> int:
        return model.training_flops(batch.tokens.shape)

    def measure(self, model: Classifier, batch: LabelBatch) -> torch.Tensor:
        logits = model(batch.tokens, batch.lengths).float()
        loss = self._cross_entropy(logits, batch, 0.0)
        classes = torch.arange(logits.shape[-1], device=logits.device)
        counted = batch.labels != IGNORE
        truth = (batch.labels[:, None] == classes).double()  # IGNORE is no class
        guess = ((logits.argmax(-1)[:, None] == classes) & counted[:, None]).double()
        counts = torch.cat([(truth * guess).sum(0), truth.sum(0), guess.sum(0)])
        return torch.cat([torch.stack([loss.double(), counted.sum().double()]), counts])

    def _cross_entropy(self, logits: torch.Tensor, batch: LabelBatch, smoothing: float) -> torch.Tensor:
        return F.cross_entropy(
            logits.float(), batch.labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing
        )

    def scores(self, sums: list[float]) -> dict[str, float]:
        loss, rows, *counts = sums
        classes = len(counts) // 3
        right, truth, guess = counts[:classes], counts[classes : 2 * classes], counts[2 * classes :]
        f1 = [2 * r / (t + g) for r, t, g in zip(right, truth, guess, strict=True) if t + g]
        return {"val_loss": loss / rows, "accuracy": sum(right) / rows, "f1": sum(f1) / len(f1), "rows": int(rows)}

    def example(self, rows: int, positions: int) -> LabelBatch:
        tokens, labels = torch.zeros(rows, positions, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
        return LabelBatch(tokens, torch.full((rows,), positions), labels, rows)

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        # the texts of a batch; of each text its length and its turn
        return BUFFERS * 8 * rows * positions + 12 * facts.documents
