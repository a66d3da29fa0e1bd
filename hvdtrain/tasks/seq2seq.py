"""Translation and summarisation: predict the target from the source (Vaswani et al. 2017)."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from hvdtrain.data.batch import IGNORE, PairBatch
from hvdtrain.data.bucketed import BucketSource, eval_rows, pair_batch
from hvdtrain.data.buckets import BucketSampler
from hvdtrain.data.corpora import Corpora
from hvdtrain.data.loader import Feed
from hvdtrain.data.records import Records
from hvdtrain.data.shards import Manifest
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.losses import LossTerms, linear_cross_entropy
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.models.transformer import TransformerOptions
from hvdtrain.options import Options, option
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training, check_kind, check_val


class Seq2SeqOptions(Options):
    label_smoothing: float = option(0.1, "share of the target's probability spread over all tokens", ge=0, lt=1)
    z_loss: float = option(0.0, "weight of (log Z)^2 in the training loss", ge=0)


class SequenceToSequence(Task[Seq2Seq, PairBatch]):
    """Cross-entropy of the target's tokens, in nats, summed; in training with smoothed labels (Szegedy et al. 2016)."""

    kind = "pairs"

    def __init__(self, options: Seq2SeqOptions):
        self._options = options

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> Seq2Seq:
        return Seq2Seq(options, manifest.vocab_size)

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_one_folder(corpora, "seq2seq", self.kind)
        _begin(corpora)

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        records, make_batch = self._open(corpora, "train", feed)
        return bucketed_training(records, feed, make_batch, "pairs")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        records, make_batch = self._open(corpora, split, feed)
        batches = partial(eval_rows, records, rows, feed.rank, feed.size, make_batch)
        return Evaluation.of(batches, len(records.lengths), rows, feed)

    def _open(self, corpora: Corpora, split: str, feed: Feed):
        records = open_records(corpora, split)
        begin = _begin(corpora)
        return records, lambda records, rows: pair_batch(records, rows, begin, feed.context)

    def loss(self, model: Seq2Seq, batch: PairBatch) -> LossSum:
        hidden = model(batch.source, batch.source_lengths, batch.tokens).flatten(0, 1)
        terms = LossTerms(self._options.label_smoothing, self._options.z_loss, IGNORE)
        total = linear_cross_entropy(hidden, model.head.weight, batch.targets.flatten(), terms)
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


def _begin(corpora: Corpora) -> int:
    """The token that begins each target: of a text, or else the one that ends them. Errors: DataError."""
    special = corpora.manifest.special_tokens
    begin = special.get("bos", special.get("eos"))
    if begin is None:
        raise DataError(
            f"{corpora.names} does not say which token begins or ends a text; prepare it with data_prep pairs"
        )
    return begin


def check_one_folder(corpora: Corpora, task_name: str, kind: str) -> None:
    """Errors: DataError for shards of another kind or without validation; ConfigError for a mixture, which only
    language models take.
    """
    check_kind(corpora, task_name, kind)
    if len(corpora.entries) > 1:
        raise ConfigError(f"task.name={task_name} takes one folder (data.dir), not data.mixture")
    check_val(corpora, "val")


def open_records(corpora: Corpora, split: str) -> Records:
    """Errors: DataError for a split that is missing or has no target."""
    check_val(corpora, split)
    records = Records(*corpora.entries[0], split)
    if not records.lengths[:, -1].any():
        raise DataError(f"the {split} split of {corpora.names} is empty; nothing to predict")
    return records


def bucketed_training(records: Records, feed: Feed, make_batch, what: str) -> Training:
    """Length-bucketed batches of ``feed.global_tokens`` padded tokens."""
    budget = feed.global_tokens or feed.global_batch * feed.context
    sampler = BucketSampler(records.lengths, budget, feed.seed, feed.context)
    dropped = f", {sampler.dropped:,} longer than model.context={feed.context} left out" if sampler.dropped else ""
    about = (
        f"{len(records) - sampler.dropped:,} {what}{dropped}; a step is up to {budget:,} tokens, at most "
        f"{sampler.padding:.0%} of them padding; {sampler.batches_per_epoch:,} steps an epoch"
    )
    return Training(BucketSource(records, sampler, feed, make_batch), about)
