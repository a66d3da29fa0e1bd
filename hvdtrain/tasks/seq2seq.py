"""Translation and summarisation: predict the target from the source (Vaswani et al. 2017)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import model_validator

from hvdtrain.data.batch import IGNORE, PairBatch
from hvdtrain.data.bucketed import MakeBatch, eval_rows, pair_batch
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.records import Records
from hvdtrain.data.shards import Manifest, target_begin
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.losses import LossTerms
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.options import Options, option
from hvdtrain.tasks.answers import Answer, Asked, Row, flags, given_over, open_tokenizer
from hvdtrain.tasks.rows import bucketed_training, check_one_folder, open_records, perplexity_of
from hvdtrain.tasks.search import Input, search
from hvdtrain.tasks.search_options import SearchOptions
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training
from hvdtrain.tasks.text_scores import SCORES, TextScores, names_of, score_names


class Seq2SeqOptions(Options):
    label_smoothing: float = option(0.1, "share of the target's probability spread over all tokens", ge=0, lt=1)
    z_loss: float = option(0.0, "weight of (log Z)^2 in the training loss", ge=0)
    scores: str = option(
        "", f"of decoded texts against the references, in each evaluation: any of {', '.join(SCORES)}; empty: none"
    )
    search: SearchOptions = SearchOptions()

    @model_validator(mode="after")
    def _scores_are_exact(self) -> "Seq2SeqOptions":
        try:
            names_of(self.scores)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.scores and self.search.temperature > 0:
            drawn = f"search.temperature={self.search.temperature} draws what is decoded"
            raise ValueError(f"{drawn}, and scores={self.scores} shall not depend on chance; set it to 0")
        return self


class SequenceToSequence(Task[Seq2Seq, PairBatch]):
    """Cross-entropy of the target's tokens, in nats, summed; in training with smoothed labels (Szegedy et al. 2016)."""

    name = "seq2seq"
    about = "a target from a source"
    options = Seq2SeqOptions
    kind = "pairs"
    predicts_tokens = True
    input_field = "source"
    compares_texts = True

    def __init__(self, options: Seq2SeqOptions):
        self._options = options
        self._decoded: _Decoded | None = None  # of an evaluation, where scores are asked for

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> Seq2Seq:
        return Seq2Seq(options, manifest.vocab_size)

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_one_folder(corpora, self)
        begin_of(corpora.manifest, corpora.names)

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        records, make_batch = self._open(corpora, "train", feed)
        return bucketed_training(records, feed, make_batch, "pairs")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        records, make_batch = self._open(corpora, split, feed)
        batches = partial(eval_rows, records, rows, feed.rank, feed.size, make_batch)
        evaluation = Evaluation.of(batches, len(records.lengths), rows, feed)
        if not self._options.scores:
            return evaluation
        self._decoded = _Decoded(self._options, corpora)
        return replace(evaluation, signatures=self._decoded.compare.signatures())

    def _open(self, corpora: Corpora, split: str, feed: Feed) -> tuple[Records, MakeBatch]:
        records = open_records(corpora, split)
        begin = begin_of(corpora.manifest)
        return records, lambda records, rows: pair_batch(records, rows, begin, feed.context)

    def inputs(self, batch: PairBatch) -> tuple[torch.Tensor | None, ...]:
        return batch.source, batch.source_lengths, batch.tokens

    def loss(self, model: Seq2Seq, output: torch.Tensor, batch: PairBatch) -> LossSum:
        terms = LossTerms(self._options.label_smoothing, self._options.z_loss, IGNORE)
        features = model.head.features(output).flatten(0, 1)
        return LossSum(model.head.cross_entropy(features, batch.targets.flatten(), terms), batch.target_tokens)

    def training_flops(self, model: Seq2Seq, batch: PairBatch) -> int:
        return model.training_flops(batch.source.shape, batch.tokens.shape)

    def measure(self, model: Seq2Seq, output: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        features, targets = model.head.features(output).flatten(0, 1), batch.targets.flatten()
        loss = model.head.cross_entropy(features, targets, LossTerms(ignore=IGNORE))
        correct = (model.head.best(features) == targets).sum()  # IGNORE is nobody's guess
        return torch.stack([loss.double(), (targets != IGNORE).sum().double(), correct.double()])

    def measure_decoded(self, model: Seq2Seq, batch: PairBatch) -> torch.Tensor | None:
        return None if self._decoded is None else self._decoded.sums(model, batch)

    def scores(self, sums: list[float]) -> dict[str, float]:
        loss = sums[0] / sums[1]
        return {
            "val_loss": loss,
            "perplexity": perplexity_of(loss),
            "token_accuracy": sums[2] / sums[1],
            "target_tokens": int(sums[1]),
            **({} if self._decoded is None else self._decoded.scores(sums[3:])),
        }

    def directions(self) -> Mapping[str, int]:
        texts = dict.fromkeys(score_names(self._options.scores), 1)
        return {"val_loss": -1, "token_accuracy": 1, **texts}

    def scored_by(self, scores: str, given: Mapping[str, Any]) -> "SequenceToSequence":
        own = self._options
        names = " ".join(names_of(scores)) or own.scores
        if given and not names:
            raise ConfigError(f"{flags(given)}: without --scores nothing is decoded")
        search = given_over(own.search, given).model_dump()
        return SequenceToSequence(given_over(own, {"scores": names, "search": search}))

    def answers(self, asked: Asked) -> "Targets":
        return Targets(asked, given_over(self._options.search, asked.given))

    def example(self, rows: int, positions: int) -> PairBatch:
        source, tokens, targets = (torch.zeros(rows, positions, dtype=torch.int64) for _ in range(3))
        return PairBatch(source, torch.full((rows,), positions), tokens, targets, rows * positions)

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        # three tensors of a batch; of each pair two lengths and its turn
        return BUFFERS * 3 * 8 * rows * positions + 20 * facts.documents


class _Decoded:
    """Decodes the sources of an evaluation and compares the texts with their targets, as the shards have them."""

    def __init__(self, options: Seq2SeqOptions, corpora: Corpora):
        self.compare = TextScores(names_of(options.scores))
        self._search, self._begin = options.search, begin_of(corpora.manifest)
        self._end = corpora.manifest.special_tokens.get("eos")
        self._tokenizer = open_tokenizer(corpora.entries[0][0] / "tokenizer.json")

    def sums(self, model: Seq2Seq, batch: PairBatch) -> torch.Tensor:
        """Of ``compare``, and how many texts the context cut: fp64 [count + 1]."""
        sources = zip(batch.source.tolist(), batch.source_lengths.tolist(), strict=True)
        inputs = [Input([self._begin], source[:length]) for source, length in sources]
        found = search(model, inputs, self._search, self._end)
        targets = [[token for token in row if token not in (IGNORE, self._end)] for row in batch.targets.tolist()]
        texts = self._tokenizer.decode_batch([of_row[0].tokens for of_row in found])
        references = [[text] for text in self._tokenizer.decode_batch(targets)]
        cut = sum(of_row[0].is_cut for of_row in found)
        return torch.tensor([*self.compare.sums(texts, references), cut], dtype=torch.float64)

    def scores(self, sums: list[float]) -> dict[str, float]:
        *compared, cut = sums
        return self.compare.scores(compared) | ({"texts_cut": int(cut)} if cut else {})


class Targets:
    """Of each source the targets that the search finds, the best first. See ``Answers``."""

    def __init__(self, asked: Asked, options: SearchOptions):
        self._asked, self._options = asked, options
        self._begin, self._end = begin_of(asked.manifest), asked.manifest.special_tokens.get("eos")
        self.tokens_at_once = options.batch_tokens // options.beam
        self.room: int | None = asked.context

    def encode(self, text: str) -> list[int]:
        """With the end that data_prep puts there."""
        tokens = self._asked.encode(text)
        return [*tokens, self._end] if tokens and self._end is not None else tokens

    def cut(self, tokens: list[int]) -> list[int]:
        """At its end, as in evaluation."""
        return tokens[: self._asked.context]

    def answer(self, model: Seq2Seq, rows: Sequence[Row]) -> list[list[Answer]]:
        inputs = [Input([self._begin], row.tokens, row.number) for row in rows]
        decode = self._asked.tokenizer.decode
        found = search(model, inputs, self._options, self._end)
        return [[Answer(decode(one.tokens), one.score, one.is_cut) for one in of_row] for of_row in found]

    def line(self, answers: Sequence[Answer]) -> str:
        return answers[0].text


def begin_of(manifest: Manifest, where: str = "the run's data") -> int:
    """The token that begins each target. Errors: DataError."""
    begin = target_begin(manifest.special_tokens)
    if begin is None:
        raise DataError(f"{where}: nothing says which token begins or ends a text; prepare them with data_prep pairs")
    return begin
