"""Masked-language-model pretraining: tell what is hidden in a text (Devlin et al. 2018, "BERT")."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch

from hvdtrain.data.batch import IGNORE, MaskedBatch
from hvdtrain.data.corpora import Corpora, CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.masked import Frame, FramedDocuments, FramedWindows, MaskedSource, eval_masked, eval_rows_of
from hvdtrain.data.masking import Masking, MaskOptions, special_tokens
from hvdtrain.data.packed import document_lengths
from hvdtrain.data.packing import PackSampler
from hvdtrain.data.sampler import share_of
from hvdtrain.data.shards import Manifest
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.words import continues_word
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.models.encoder import MaskedLanguageModel
from hvdtrain.models.losses import LossTerms
from hvdtrain.models.options import TransformerOptions
from hvdtrain.options import option
from hvdtrain.tasks.rows import check_text, drawn_windows, perplexity_of, step_in_words
from hvdtrain.tasks.task import Evaluation, LossSum, Task, Training, check_val

_FRAME = 2  # tokens around the text of a row
_TERMS = LossTerms(ignore=IGNORE)


class MaskedTextOptions(MaskOptions):
    rows: Literal["windows", "packed"] = option(
        "windows", "windows: cuts of the token stream; packed: whole documents, best fit, which see one another"
    )


class MaskedText(Task[MaskedLanguageModel, MaskedBatch]):
    """Cross-entropy of the tokens that were drawn, in nats, summed; and which share of them is told right."""

    name = "mlm"
    about = "tell what is hidden in a text"
    options = MaskedTextOptions
    kind = "text"
    rows_are_alike = True
    predicts_tokens = True

    def __init__(self, options: MaskedTextOptions):
        self._options = options
        self.rows_are_packed = options.rows == "packed"

    def make_model(self, options: TransformerOptions, manifest: Manifest) -> MaskedLanguageModel:
        return MaskedLanguageModel(options, manifest.vocab_size)

    def check(self, corpora: Corpora, feed: Feed) -> None:
        check_text(corpora, self)
        if feed.context <= _FRAME:
            raise ConfigError(f"model.context={feed.context} leaves no room for text: [CLS] and [SEP] are of each row")
        share_of(feed.global_batch, feed.microbatch, feed.rank, feed.size)
        self._masking(corpora)
        for folder, manifest in corpora.entries:
            tokens, needed = sum(info.tokens for info in manifest.split("train")), feed.context - _FRAME + 1
            if manifest.split("train") and tokens < needed and not self.rows_are_packed:
                raise DataError(
                    f"the train split of {folder} has {tokens} tokens: model.context={feed.context} needs {needed}; "
                    "prepare more text or lower model.context"
                )

    def open_training(self, corpora: Corpora, feed: Feed) -> Training:
        stream, frame = TokenStream(corpora.entries, "train"), Frame.of(feed.context, corpora.manifest.special_tokens)
        masking, tokens, step = self._masking(corpora), f"{len(stream):,} training tokens", step_in_words(feed)
        if self.rows_are_packed:
            packs = PackSampler(document_lengths(corpora), frame.room, feed.seed)
            about = f"{tokens} packed into rows that are {packs.efficiency:.1%} full; {step}"
            return Training(MaskedSource(stream, FramedDocuments(stream, packs, frame), masking, feed), about)
        windows, shares = drawn_windows(corpora, stream, frame.room, feed.seed)
        source = MaskedSource(stream, FramedWindows(stream, windows, frame), masking, feed)
        return Training(source, f"{tokens}; {step}{shares}")

    def open_evaluation(self, corpora: Corpora, split: str, feed: Feed, rows: int) -> Evaluation:
        check_val(corpora, split)
        stream, frame = TokenStream(corpora.entries, split), Frame.of(feed.context, corpora.manifest.special_tokens)
        if not len(stream):
            raise DataError(f"the {split} split of {corpora.names} is empty; nothing to predict")
        batches = partial(eval_masked, stream, frame, self._masking(corpora), rows, feed.rank, feed.size)
        return Evaluation.of(batches, eval_rows_of(stream, frame), rows, feed)

    def _masking(self, corpora: Corpora) -> Masking:
        """Errors: DataError for a tokenizer without [MASK], or whose words cannot be told where they are asked for."""
        manifest, tokenizer = corpora.manifest, corpora.entries[0][0] / "tokenizer.json"
        if "mask" not in manifest.special_tokens:
            raise DataError(
                f"task.name={self.name} hides tokens behind [MASK], which the tokenizer of {corpora.names} lacks; make "
                "one with `python -m data_prep tokenizer --special cls sep mask pad`, and the shards with it"
            )
        special = special_tokens(tokenizer, manifest)
        if special.all():
            raise DataError(f"{tokenizer} has no token but special ones; nothing to predict")
        words = continues_word(tokenizer, manifest.vocab_size) if self._options.whole_words else None
        return Masking(self._options, manifest.special_tokens["mask"], special, words)

    def inputs(self, batch: MaskedBatch) -> tuple[torch.Tensor | None, ...]:
        return batch.tokens, batch.lengths

    def loss(self, model: MaskedLanguageModel, output: torch.Tensor, batch: MaskedBatch) -> LossSum:
        features = self._features(model, output, batch)
        return LossSum(model.head.cross_entropy(features, batch.targets, _TERMS), batch.target_tokens)

    def training_flops(self, model: MaskedLanguageModel, batch: MaskedBatch) -> int:
        return model.training_flops(batch.tokens.shape, batch.target_tokens)

    def measure(self, model: MaskedLanguageModel, output: torch.Tensor, batch: MaskedBatch) -> torch.Tensor:
        features = self._features(model, output, batch)
        total = model.head.cross_entropy(features, batch.targets, _TERMS)
        right = (model.head.best(features) == batch.targets).sum()  # IGNORE is nobody's guess
        return torch.stack([total.double(), total.new_tensor(batch.target_tokens, dtype=torch.float64), right.double()])

    def _features(self, model: MaskedLanguageModel, hidden: torch.Tensor, batch: MaskedBatch) -> torch.Tensor:
        """What the head multiplies, of the tokens alone that are to be told: [M, D]."""
        return model.head.features(hidden.flatten(0, 1).index_select(0, batch.places))

    def scores(self, sums: list[float]) -> dict[str, float]:
        loss = sums[0] / sums[1]
        return {
            "val_loss": loss,
            "perplexity": perplexity_of(loss),
            "masked_accuracy": sums[2] / sums[1],
            "target_tokens": int(sums[1]),
        }

    def directions(self) -> Mapping[str, int]:
        return {"val_loss": -1, "masked_accuracy": 1}

    def example(self, rows: int, positions: int) -> MaskedBatch:
        count = rows * int(self._options.count(max(1, positions - _FRAME)))
        tokens, places = torch.zeros(rows, positions, dtype=torch.int64), torch.arange(count)
        targets = torch.zeros(count, dtype=torch.int64)
        return MaskedBatch(tokens, torch.full((rows,), positions), places, targets, count)

    def loader_bytes(self, rows: int, positions: int, steps_per_epoch: int | None, facts: CorpusFacts) -> int:
        # the tokens of a batch, what is to be told and where; of packed documents their beginnings and turns
        told = rows * int(self._options.count(positions))
        return BUFFERS * 8 * (rows * positions + 2 * told) + 16 * facts.documents * self.rows_are_packed
