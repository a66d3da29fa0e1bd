"""Translation and summarisation: predict the target from the source (Vaswani et al. 2017)."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from hvdtrain.data.batch import IGNORE, PairBatch
from hvdtrain.data.bucketed import MakeBatch, eval_rows, pair_batch
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.records import Records
from hvdtrain.data.shards import Manifest
from hvdtrain.errors import DataError
from hvdtrain.models.losses import LossTerms, linear_cross_entropy
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.options import Options, option
from hvdtrain.tasks.rows import bucketed_training, check_one_folder, open_records
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training


class Seq2SeqOptions(Options):
    label_smoothing: float = option(0.1, "share of the target's probability spread over all tokens", ge=0, lt=1)
    z_loss: float = option(0.0, "weight of (log Z)^2 in the training loss", ge=0)


class SequenceToSequence(Task[Seq2Seq, PairBatch]):
    """Cross-entropy of the target's tokens, in nats, summed; in training with smoothed labels (Szegedy et al. 2016)."""

    name = "seq2seq"
    about = "a target from a source"
    options = Seq2SeqOptions
    kind = "pairs"
    predicts_tokens = True

    def __init__(self, options: Seq2SeqOptions):
        self._options = options

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> Seq2Seq:
        return Seq2Seq(options, manifest.vocab_size)

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_one_folder(corpora, self)
        _begin(corpora)

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        records, make_batch = self._open(corpora, "train", feed)
        return bucketed_training(records, feed, make_batch, "pairs")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        records, make_batch = self._open(corpora, split, feed)
        batches = partial(eval_rows, records, rows, feed.rank, feed.size, make_batch)
        return Evaluation.of(batches, len(records.lengths), rows, feed)

    def _open(self, corpora: Corpora, split: str, feed: Feed) -> tuple[Records, MakeBatch]:
        records = open_records(corpora, split)
        begin = _begin(corpora)
        return records, lambda records, rows: pair_batch(records, rows, begin, feed.context)

    def loss(self, model: Seq2Seq, batch: PairBatch) -> LossSum:
        hidden, head = model(batch.source, batch.source_lengths, batch.tokens), model.head
        terms = LossTerms(self._options.label_smoothing, self._options.z_loss, IGNORE)
        features = head.features(hidden).flatten(0, 1)
        total = linear_cross_entropy(features, head.weight, batch.targets.flatten(), terms, bias=head.bias)
        return LossSum(total, batch.target_tokens)

    def training_flops(self, model: Seq2Seq, batch: PairBatch) -> int:
        return model.training_flops(batch.source.shape, batch.tokens.shape)

    def measure(self, model: Seq2Seq, batch: PairBatch) -> torch.Tensor:
        logits = model.logits(model(batch.source, batch.source_lengths, batch.tokens)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
        counted = (batch.targets != IGNORE).sum()
        correct = (logits.argmax(-1) == batch.targets).sum()  # IGNORE is nobody's guess
        return torch.stack([loss.double(), counted.double(), correct.double()])

    def scores(self, sums: list[float]) -> dict[str, float]:
        loss = sums[0] / sums[1]
        return {
            "val_loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": sums[2] / sums[1],
            "target_tokens": int(sums[1]),
        }

    def example(self, rows: int, positions: int) -> PairBatch:
        source, tokens, targets = (torch.zeros(rows, positions, dtype=torch.int64) for _ in range(3))
        return PairBatch(source, torch.full((rows,), positions), tokens, targets, rows * positions)

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        # three tensors of a batch; of each pair two lengths and its turn
        return BUFFERS * 3 * 8 * rows * positions + 20 * facts.documents


def _begin(corpora: Corpora) -> int:
    """The token that begins each target: of a text, or else the one that ends them. Errors: DataError."""
    special = corpora.manifest.special_tokens
    begin = special.get("bos", special.get("eos"))
    if begin is None:
        raise DataError(
            f"{corpora.names} does not say which token begins or ends a text; prepare it with data_prep pairs"
        )
    return begin
