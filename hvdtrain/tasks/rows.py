"""What tasks share: those on text, and those whose rows have lengths of their own (pairs, labelled texts)."""

import math
from typing import Any

from hvdtrain.data.bucketed import BucketSource, MakeBatch
from hvdtrain.data.buckets import BucketSampler
from hvdtrain.data.corpora import Corpora
from hvdtrain.data.loader import Feed
from hvdtrain.data.records import Records
from hvdtrain.data.sampler import WindowSampler, derive
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import MixedWindows, RowSampler
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.tasks.task import Task, Training, check_kind, check_val


def check_text(corpora: Corpora, task: Task[Any, Any]) -> None:
    """Errors: DataError for shards of another kind or without validation; ConfigError for a mixture of packed rows."""
    check_kind(corpora, task)
    check_val(corpora, "val")
    if task.rows_are_packed and len(corpora.entries) > 1:
        raise ConfigError(f"task.{task.name}.rows=packed takes one folder (data.dir), not data.mixture")


def step_in_words(feed: Feed) -> str:
    """How large a step is whose rows are alike."""
    step = f"a step is {feed.global_batch} x {feed.context} tokens"
    if feed.ramp is None:
        return step
    return f"{step}, from {feed.ramp.start} x {feed.context} up over {feed.ramp.rows * feed.context:,} tokens"


def drawn_windows(corpora: Corpora, stream: TokenStream, context: int, seed: int) -> tuple[RowSampler, str]:
    """Windows of the training text, mixed where there are several corpora; and of those what share each has, in words.

    stream: of all corpora. Errors: DataError where one is shorter than a window.
    """
    samplers = [
        # Each corpus draws by a seed of its own, or those of one size would draw alike.
        WindowSampler(
            sum(info.tokens for info in manifest.split("train")), context, derive(seed, number, 6) if number else seed
        )
        for number, (_, manifest) in enumerate(corpora.entries)
    ]
    if len(samplers) == 1:
        return samplers[0], ""
    windows = MixedWindows(samplers, stream.bases, corpora.weights, seed)
    named = zip(corpora.entries, windows.mixture.share, strict=True)
    return windows, ", of " + ", ".join(f"{folder} {share:.1%}" for (folder, _), share in named)


def perplexity_of(loss: float) -> float:
    """Of a loss in nats per token; finite for any."""
    return math.exp(min(loss, 700.0))


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
