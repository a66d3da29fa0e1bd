"""Which tokens of a row are hidden from the model, and what stands in their place (Devlin et al. 2018, 3.1)?

    row       [CLS]  un   ##aff ##able weather  today  [SEP]
    drawn                              *        *                  a share of the tokens, special ones aside
    tokens    [CLS]  un   ##aff ##able [MASK]   banana [SEP]       most are hidden, some become any other token
    targets     .    .    .     .      weather  today    .         what was there; the others do not count

    whole words      *    *     *                                  the tokens of a word are drawn together

Everything is drawn by a row's key and a token's place in it, never from how often somebody drew before: the same rows
get the same masks on any number of ranks, in microbatches of any size, and in a run that goes on.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import model_validator

from hvdtrain.data.batch import IGNORE
from hvdtrain.data.sampler import derive_each, mix
from hvdtrain.data.shards import Manifest
from hvdtrain.files import read_text
from hvdtrain.options import Options, option


class MaskOptions(Options):
    share: float = option(0.15, "of a row's tokens that are to be told, special tokens aside; one at least", gt=0, le=1)
    masked: float = option(0.8, "share of those that the mask token hides", ge=0, le=1)
    random: float = option(0.1, "share of those that become any token; the rest stays as it is", ge=0, le=1)
    whole_words: bool = option(False, "draw all tokens of a word together; the last word drawn may exceed the share")

    @model_validator(mode="after")
    def _shares_fit(self) -> "MaskOptions":
        if (total := self.masked + self.random) > 1 + 1e-9:
            raise ValueError(
                f"masked={self.masked} and random={self.random} add up to {total:.6g}; they are shares of the same "
                "tokens, at most 1 together"
            )
        return self

    def count(self, tokens: np.ndarray | int) -> np.ndarray:
        """How many of ``tokens`` that may be drawn are drawn, at least: int64."""
        return np.minimum(tokens, np.maximum(1, np.rint(self.share * np.asarray(tokens)))).astype(np.int64)


class Masking:
    """``masking(tokens, keys) -> (tokens, targets)``.

    mask_token: hides. special: bool [V], the tokens that are never drawn and replace none. continues: bool [V], the
    tokens that continue a word; None: each token is drawn by itself.
    """

    def __init__(self, options: MaskOptions, mask_token: int, special: np.ndarray, continues: np.ndarray | None):
        self._options, self._mask_token, self._special, self._continues = options, mask_token, special, continues
        self._ordinary = np.flatnonzero(~special)

    def __call__(self, tokens: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """tokens: int64 [rows, T]; keys: uint64 [rows]. What the model sees, and what it shall tell, IGNORE where
        nothing: both int64 [rows, T].
        """
        drawn = self._draw(tokens, keys)
        seen = tokens.copy()
        row, place = np.nonzero(drawn)
        chance = mix(place, derive_each(keys[row], 1)) / 2.0**64
        is_masked = chance < self._options.masked
        is_random = ~is_masked & (chance < self._options.masked + self._options.random)
        seen[row[is_masked], place[is_masked]] = self._mask_token
        row, place = row[is_random], place[is_random]
        number = mix(place, derive_each(keys[row], 2)) % np.uint64(len(self._ordinary))
        seen[row, place] = self._ordinary[number.astype(np.int64)]
        return seen, np.where(drawn, tokens, IGNORE)

    def _draw(self, tokens: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Words in the order of their numbers in a lottery, until the share is reached: bool [rows, T]."""
        free = ~self._special[tokens]
        places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        word = self._words(tokens, free, places)
        ticket = mix(word, derive_each(keys, 0)[:, None])
        ticket[~free] = np.iinfo(np.uint64).max
        order = np.argsort(ticket, axis=1, kind="stable")  # the tokens of a word have one ticket, and stay together
        word = np.take_along_axis(word, order, axis=1)
        begins = np.ones_like(free)
        begins[:, 1:] = word[:, 1:] != word[:, :-1]
        drawn_before = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
        enough = self._options.count(free.sum(axis=1))[:, None]
        drawn = np.empty_like(free)
        np.put_along_axis(drawn, order, drawn_before < enough, axis=1)
        return drawn & free

    def _words(self, tokens: np.ndarray, free: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The place where each token's word begins: int64 [rows, T]. Special tokens and the row's edge part words."""
        if self._continues is None:
            return places
        goes_on = free & self._continues[tokens]
        return np.maximum.accumulate(np.where(goes_on, 0, places), axis=1)


def special_tokens(tokenizer: Path, manifest: Manifest) -> np.ndarray:
    """Which ids are no ordinary tokens: those with a role, those that the tokenizer marks as special, and those that
    it gives to nobody. bool [V].
    """
    fields: Mapping[str, Any] = json.loads(read_text(tokenizer))
    vocab, added = fields["model"]["vocab"], fields.get("added_tokens", [])
    special = np.ones(manifest.vocab_size, bool)
    special[list(vocab.values()) if isinstance(vocab, dict) else np.arange(len(vocab))] = False
    for token in added:
        special[token["id"]] = bool(token.get("special"))
    special[list(manifest.special_tokens.values())] = True
    return special
