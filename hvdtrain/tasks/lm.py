"""Language-model pretraining: predict the next token."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch

from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.packed import PackedSource, document_lengths
from hvdtrain.data.packing import PackSampler
from hvdtrain.data.sampler import share_of
from hvdtrain.data.shards import Manifest, token_dtype
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import WindowSource, eval_windows, steps_per_block
from hvdtrain.errors import DataError
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.losses import LossTerms
from hvdtrain.models.options import TransformerOptions
from hvdtrain.options import Options, option
from hvdtrain.tasks.answers import Answer, Asked, Row, given_over
from hvdtrain.tasks.rows import check_text, drawn_windows, perplexity_of, step_in_words
from hvdtrain.tasks.search import Input, search
from hvdtrain.tasks.search_options import SearchOptions
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training, check_val


class LanguageModelOptions(Options):
    rows: Literal["windows", "packed"] = option(
        "windows", "windows: cuts of the token stream; packed: whole documents, best fit, each seen by itself"
    )
    label_smoothing: float = option(0.0, "share of the target's probability spread over all tokens", ge=0, lt=1)
    z_loss: float = option(0.0, "weight of (log Z)^2 in the training loss; PaLM: 1e-4", ge=0)


class LanguageModel(Task[Decoder, Batch]):
    """Cross-entropy of the next token, in nats, summed over the targets that count."""

    name = "lm"
    about = "predict the next token"
    options = LanguageModelOptions
    kind = "text"
    rows_are_alike = True
    predicts_tokens = True

    def __init__(self, options: LanguageModelOptions | None = None):
        self._options = options or LanguageModelOptions()
        self.rows_are_packed = self._options.rows == "packed"

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> Decoder:
        return Decoder(options, manifest.vocab_size)

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_text(corpora, self)
        share_of(feed.global_batch, feed.microbatch, feed.rank, feed.size)

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        stream, step = TokenStream(corpora.entries, "train"), step_in_words(feed)
        if self.rows_are_packed:
            end = corpora.manifest.special_tokens.get("eos", 0)
            sampler = PackSampler(document_lengths(corpora), feed.context, feed.seed)
            about = f"{len(stream):,} training tokens packed into rows that are {sampler.efficiency:.1%} full; {step}"
            return Training(PackedSource(stream, sampler, feed, end), about)
        windows, shares = drawn_windows(corpora, stream, feed.context, feed.seed)
        return Training(WindowSource(stream, windows, feed), f"{len(stream):,} training tokens; {step}{shares}")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        check_val(corpora, split)
        stream = TokenStream(corpora.entries, split)
        if split == "val" and len(stream) < feed.context + 1:
            raise DataError(
                f"the val split of {corpora.names} has {len(stream)} tokens, fewer than one context: "
                f"model.context={feed.context} needs {feed.context + 1}; "
                "prepare it again with a larger --val-fraction, or lower model.context"
            )
        if len(stream) < 2:
            raise DataError(f"the {split} split of {corpora.names} has {len(stream)} tokens; nothing to predict")
        batches = partial(eval_windows, stream, feed.context, rows, feed.rank, feed.size)
        return Evaluation.of(batches, -(-(len(stream) - 1) // feed.context), rows, feed)

    def inputs(self, batch: Batch) -> tuple[torch.Tensor | None, ...]:
        return batch.tokens, batch.positions, batch.segments

    def loss(self, model: Decoder, output: torch.Tensor, batch: Batch) -> LossSum:
        terms = LossTerms(self._options.label_smoothing, self._options.z_loss, IGNORE)
        return LossSum(self._cross_entropy(model, output, batch, terms), batch.target_tokens)

    def training_flops(self, model: Decoder, batch: Batch) -> int:
        return model.training_flops(batch.tokens.shape, batch.segments)

    def measure(self, model: Decoder, output: torch.Tensor, batch: Batch) -> torch.Tensor:
        total = self._cross_entropy(model, output, batch, LossTerms(ignore=IGNORE))
        return torch.stack([total.double(), total.new_tensor(batch.target_tokens, dtype=torch.float64)])

    def _cross_entropy(self, model: Decoder, hidden_BTD: torch.Tensor, batch: Batch, terms: LossTerms) -> torch.Tensor:
        features = model.head.features(hidden_BTD).flatten(0, 1)
        return model.head.cross_entropy(features, batch.targets.flatten(), terms)

    def scores(self, sums: list[float]) -> dict[str, float]:
        loss = sums[0] / sums[1]
        return {"val_loss": loss, "perplexity": perplexity_of(loss), "target_tokens": int(sums[1])}

    def answers(self, asked: Asked) -> "Continuations":
        return Continuations(asked)

    def example(self, rows: int, positions: int) -> Batch:
        tokens, targets = (torch.zeros(rows, positions, dtype=torch.int64) for _ in range(2))
        return Batch(tokens, targets, rows * positions)

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        if self.rows_are_packed:  # four tensors of a batch; where each document begins and which row it is in
            return BUFFERS * 4 * 8 * rows * positions + 16 * facts.documents
        step = rows * (positions + 1)
        narrow = BUFFERS * steps_per_block(step, steps_per_epoch) * token_dtype(facts.vocab_size).itemsize
        return step * (narrow + 8)  # and the step that is handed out, as int64


class Continuations:
    """Each text, and what the model goes on with; drawn, unless a beam is asked for. See ``Answers``."""

    def __init__(self, asked: Asked):
        drawn = {"temperature": 0.8} if asked.given.get("beam", 1) == 1 else {}
        self._asked, self._options = asked, given_over(SearchOptions(), {**drawn, **asked.given})
        self._end = asked.manifest.special_tokens.get("eos")
        self.tokens_at_once = self._options.batch_tokens // self._options.beam
        self.room = asked.context if self._options.beam > 1 else None

    def encode(self, text: str) -> list[int]:
        """Where there are none: what ends a text, after which another begins."""
        return self._asked.encode(text) or ([self._end] if self._end is not None else [])

    def cut(self, tokens: list[int]) -> list[int]:
        return tokens[-self._asked.context :]

    def answer(self, model: Decoder, rows: Sequence[Row]) -> list[list[Answer]]:
        inputs = [Input(row.tokens, number=row.number) for row in rows]
        found = search(model, inputs, self._options, self._end)
        return [
            [Answer(row.text + self._added(row.tokens, one.tokens), one.score, one.is_cut) for one in of_row]
            for row, of_row in zip(rows, found, strict=True)
        ]

    def _added(self, tokens: list[int], new: list[int]) -> str:
        """What the new tokens say after the others: some decoders drop the space before a text's first word."""
        decode = self._asked.tokenizer.decode
        before, whole = decode(tokens), decode([*tokens, *new])
        return whole[len(before) :] if whole.startswith(before) else decode(new)

    def line(self, answers: Sequence[Answer]) -> str:
        return answers[0].text
