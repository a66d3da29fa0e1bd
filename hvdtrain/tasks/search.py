"""Texts and targets token by token: greedy, beam search and sampling, many inputs at once.

Shape letters:  B rows (inputs), N beams of a row, T positions of prompts, D model width, V vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from hvdtrain.errors import ConfigError
from hvdtrain.models.cache import Cache
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.seq2seq import Seq2Seq
from hvdtrain.tasks.beams import Beams
from hvdtrain.tasks.next_token import draw, obey
from hvdtrain.tasks.search_options import SearchOptions


@dataclass(frozen=True)
class Input:
    """``tokens``: what the model goes on from, at least one: the beginning of a text, or what begins a target.

    ``source``: what an encoder-decoder's encoder reads; of a decoder None.
    ``number``: its place in all that the user gave, over all ranks: what is drawn depends on it.
    """

    tokens: Sequence[int]
    source: Sequence[int] | None = None
    number: int = 0


@dataclass(frozen=True)
class Hypothesis:
    """``tokens``: what was added, without ``stop``.

    ``score``: sum of log p / tokens^length_penalty, ``stop`` counted. ``is_cut``: it came to the end of the context,
    before ``stop`` and before ``max_tokens``.
    """

    tokens: list[int]
    score: float
    is_cut: bool = False


@torch.no_grad()
def search(
    model: Decoder | Seq2Seq, inputs: Sequence[Input], options: SearchOptions, stop: int | None
) -> list[list[Hypothesis]]:
    """For each input, in their order, its ``n_best`` hypotheses, the best first (local, no collective).

    stop: the token that ends a text. What one input gives does not depend on the others.

    Beyond a decoder's context one text goes on (``beam`` 1): the older half of it is forgotten then, so that the cache
    is refilled rarely. Beams, and targets of an encoder-decoder, end there.

    Errors: ConfigError where an input is longer than the context or a forced token is not in the vocabulary.
    """
    _check(model, inputs, options)
    context = model.options.context
    waiting = [_Text(place, item, list(item.tokens)[-context:]) for place, item in enumerate(inputs)]
    found: dict[int, list[Hypothesis]] = {}
    while waiting:
        waiting.sort(key=_Text.length, reverse=True)
        longest = max(1, waiting[0].length())
        rows = max(1, options.batch_tokens // (options.beam * longest))
        batch, waiting = waiting[:rows], waiting[rows:]
        for text, hypotheses in _Batch(model, batch, options, stop).run():
            if hypotheses is None:
                waiting.append(text)
            else:
                found[text.place] = hypotheses
    return [found[place] for place in range(len(inputs))]


def _check(model: Decoder | Seq2Seq, inputs: Sequence[Input], options: SearchOptions) -> None:
    context, vocabulary = model.options.context, model.vocab_size
    for name in ("forced_first", "forced_last"):
        token = getattr(options, name)
        if token is not None and token >= vocabulary:
            raise ConfigError(f"{name}={token} is not in the vocabulary, which has {vocabulary} tokens (from 0)")
    for item in inputs:
        where = f"input {item.number + 1}"
        if not item.tokens:
            raise ConfigError(f"{where} has no token to go on from")
        if item.source is not None and len(item.source) > context:
            raise ConfigError(f"{where} has {len(item.source)} tokens, more than model.context={context}; shorten it")
        if (item.source is not None or options.beam > 1) and len(item.tokens) > context:
            raise ConfigError(
                f"{where} begins with {len(item.tokens)} tokens, more than model.context={context}; shorten it"
                + ("" if item.source is not None else ", or set beam=1, which sees the newest of them")
            )


@dataclass
class _Text:
    """An input and how far it has come. ``window``: what the model reads; ``new``: tokens added, ``value``: of these
    the sum of log p.
    """

    place: int
    item: Input
    window: list[int]
    new: list[int] = field(default_factory=list)
    value: float = 0.0

    def length(self) -> int:
        return len(self.window) + len(self.item.source or [])


class _Batch:
    """Texts that are continued together, each until it has ended or has come to the end of the context."""

    def __init__(self, model: Decoder | Seq2Seq, texts: list[_Text], options: SearchOptions, stop: int | None):
        self._model, self._texts, self._options, self._stop = model, texts, options, stop
        self._device, context = model.any_weight.device, model.options.context
        self._counts = [len(text.new) for text in texts]
        self._rooms = [len(text.new) + context - len(text.window) + 1 for text in texts]  # the last is not read again
        self._goes_on = options.beam == 1 and texts[0].item.source is None
        most = options.max_tokens
        limits = [most if self._goes_on else min(most, room) for room in self._rooms]
        begun = [[*text.item.tokens, *text.new] for text in texts]
        self._beams = Beams(options, stop, begun, self._counts, [text.value for text in texts], limits, self._device)
        self._gone = [False] * len(texts)

    def run(self) -> Iterator[tuple[_Text, list[Hypothesis] | None]]:
        """Texts as they leave; None: there is more to come, of a window of its own."""
        cache, hidden_BND = self._read()
        while True:
            log_p_BNV = self._log_p(hidden_BND)
            parents_BN, tokens_BN = self._beams.advance(*self._candidates(log_p_BNV))
            self._counts = [count + 1 for count in self._counts]
            yield from self._leaving()
            rows = [row for row, gone in enumerate(self._gone) if not gone]
            if not rows:
                return
            if self._is_time_to_drop(len(rows)):
                kept = torch.tensor(rows, device=self._device)
                cache.select(kept)
                self._select(rows, kept)
                parents_BN, tokens_BN = parents_BN[kept], tokens_BN[kept]
            if self._options.beam > 1:  # the beams of a prompt begin alike, as one branch
                cache.branch(parents_BN if hidden_BND.shape[1] > 1 else torch.zeros_like(parents_BN))
            hidden_BND = self._model.decode(tokens_BN, cache)

    def _read(self) -> tuple[Cache, torch.Tensor]:
        """A cache that has seen what the texts begin with, and the hidden states of their last tokens: [B, 1, D]."""
        windows_BT, lengths_B = self._padded([text.window for text in self._texts])
        are_alike = bool((lengths_B == windows_BT.shape[1]).all())
        cache = self._model.new_cache(None if are_alike else lengths_B)
        if self._texts[0].item.source is not None:
            sources = [list(text.item.source or []) for text in self._texts]
            cast(Seq2Seq, self._model).read(*self._padded(sources), cache)
        hidden_BTD = self._model.decode(windows_BT, cache)
        return cache, hidden_BTD[torch.arange(len(lengths_B), device=self._device), lengths_B - 1][:, None]

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(1, *map(len, rows))
        tokens = [row + [0] * (longest - len(row)) for row in rows]
        lengths = [len(row) for row in rows]
        return torch.tensor(tokens, device=self._device), torch.tensor(lengths, device=self._device)

    def _log_p(self, hidden_BND: torch.Tensor) -> torch.Tensor:
        """log p of the next tokens under the rules, without the padding of the vocabulary: fp32 [B, N, V]."""
        logits_BNV = self._model.logits(hidden_BND)[..., : self._model.vocab_size]
        log_p_BNV = logits_BNV.float().log_softmax(-1)
        if log_p_BNV.shape[1] < self._options.beam:  # the beams of a prompt begin alike
            log_p_BNV = log_p_BNV.repeat(1, self._options.beam, 1)
        beams = self._beams
        obey(self._options, self._stop, log_p_BNV, beams.text_BNL, beams.count_B, beams.limit_B)
        return log_p_BNV

    def _candidates(self, log_p_BNV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._options.temperature == 0:
            return self._beams.candidates(log_p_BNV)
        numbers = [text.item.number for text in self._texts]
        tokens_B1 = draw(self._options, log_p_BNV[:, 0], numbers, self._counts)[:, None]
        values_B1 = self._beams.values_BN + log_p_BNV[:, 0].gather(1, tokens_B1)
        return values_B1, torch.zeros_like(tokens_B1), tokens_B1

    def _leaving(self) -> Iterator[tuple[_Text, list[Hypothesis] | None]]:
        context = self._model.options.context
        for row, (text, has_ended) in enumerate(zip(self._texts, self._beams.has_ended.tolist(), strict=True)):
            if self._gone[row]:
                continue
            if has_ended:
                self._gone[row] = True
                yield text, self._hypotheses(row)
            elif self._counts[row] == self._rooms[row]:
                self._gone[row] = True
                whole = self._beams.text(row)
                text.new, text.window = whole[len(text.item.tokens) :], whole[-max(1, context // 2) :]
                text.value = float(self._beams.values_BN[row, 0])
                yield text, None

    def _hypotheses(self, row: int) -> list[Hypothesis]:
        begun, found = len(self._texts[row].item.tokens), []
        room = self._options.max_tokens if self._goes_on else self._rooms[row]
        for tokens, score in self._beams.hypotheses(row)[: self._options.n_best]:
            has_stop = tokens[-1] == self._stop
            ends_by_itself = has_stop and self._options.forced_last is None
            is_cut = not ends_by_itself and len(tokens) - begun == room < self._options.max_tokens
            found.append(Hypothesis(tokens[begun : len(tokens) - has_stop], score, is_cut))
        return found

    def _is_time_to_drop(self, left: int) -> bool:
        """Rows that have ended leave when they are an eighth, or could not be fed another token."""
        gone, rows = self._gone, len(self._texts)
        at_the_end = any(gone[row] and self._counts[row] >= self._rooms[row] for row in range(rows))
        return at_the_end or 8 * (rows - left) >= rows

    def _select(self, rows: list[int], kept: torch.Tensor) -> None:
        self._beams.select(kept)
        for name in ("_texts", "_counts", "_rooms", "_gone"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])
