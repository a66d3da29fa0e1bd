"""What tasks share whose rows are documents with lengths of their own: pairs, labelled texts."""

from typing import Any

from hvdtrain.data.bucketed import BucketSource, MakeBatch
from hvdtrain.data.buckets import BucketSampler
from hvdtrain.data.corpora import Corpora
from hvdtrain.data.loader import Feed
from hvdtrain.data.records import Records
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.tasks.task import Task, Training, check_kind, check_val


def check_one_folder(corpora: Corpora, task: Task[Any, Any]) -> None:
    """Errors: DataError for shards of another kind or without validation; ConfigError for a mixture, which only
    language models take.
    """
    check_kind(corpora, task)
    if len(corpora.entries) > 1:
        raise ConfigError(f"task.name={task.name} takes one folder (data.dir), not data.mixture")
    check_val(corpora, "val")


def open_records(corpora: Corpora, split: str) -> Records:
    """Errors: DataError for a split that is missing or has no target."""
    check_val(corpora, split)
    records = Records(*corpora.entries[0], split)
    if not records.lengths[:, -1].any():
        raise DataError(f"the {split} split of {corpora.names} is empty; nothing to predict")
    return records


def bucketed_training(records: Records, feed: Feed, make_batch: MakeBatch, what: str) -> Training:
    """Length-bucketed batches of ``feed.global_tokens`` padded tokens."""
    budget = feed.global_tokens or feed.global_batch * feed.context
    sampler = BucketSampler(records.lengths, budget, feed.seed, feed.context)
    dropped = f", {sampler.dropped:,} longer than model.context={feed.context} left out" if sampler.dropped else ""
    about = (
        f"{len(records) - sampler.dropped:,} {what}{dropped}; a step is up to {budget:,} tokens, at most "
        f"{sampler.padding:.0%} of them padding; {sampler.batches_per_epoch:,} steps an epoch"
    )
    return Training(BucketSource(records, sampler, feed, make_batch), about, sampler.longest)
