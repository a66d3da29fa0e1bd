"""Masked rows of text: the picture at the top of masked.py, masks of each epoch, the same in each evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CPU, documents, write_corpus

from hvdtrain.data.batch import IGNORE, MaskedBatch
from hvdtrain.data.loader import Feed
from hvdtrain.data.masked import (
    Frame,
    FramedDocuments,
    FramedWindows,
    MaskedSource,
    TextRows,
    eval_masked,
    eval_rows_of,
    masked_batch,
)
from hvdtrain.data.masking import Masking, MaskOptions
from hvdtrain.data.packing import PackSampler
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.stream import TokenStream

LETTERS = "^$?.#abcdefghijklm"  # [CLS], [SEP], [MASK], padding, end of a document
ROLES = {"cls": 0, "sep": 1, "mask": 2, "pad": 3, "eos": 4}
MASKING = Masking(MaskOptions(share=0.3, random=0), 2, np.arange(len(LETTERS)) < 5, None)


def stream_of(folder: Path, *texts: str, split: str = "train") -> TokenStream:
    shard = documents([[LETTERS.index(letter) for letter in text] for text in texts], len(LETTERS))
    return TokenStream([(folder, write_corpus(folder, {split: [shard]}, len(LETTERS)))], split)


def spelled(tokens: np.ndarray | torch.Tensor) -> list[str]:
    return ["".join(LETTERS[token] for token in row) for row in tokens.tolist()]


def unmasked(batch: MaskedBatch) -> list[str]:
    tokens = batch.tokens.clone().flatten()
    counted = batch.targets != IGNORE
    tokens[batch.places[counted]] = batch.targets[counted]
    return spelled(tokens.view(batch.tokens.shape))


def test_windows_go_over_the_ends_of_documents(tmp_path: Path):
    stream = stream_of(tmp_path, "abc#", "efg#", "hiklm#", "d#")
    rows = FramedWindows(stream, WindowSampler(len(stream), 5, seed=1), Frame.of(7, ROLES))
    tokens, lengths = rows(0, rows.rows_per_epoch)
    assert lengths.tolist() == [7, 7]
    line = "abc#efg#hiklm#d#"
    found = spelled(tokens)
    assert all((row[0], row[-1]) == ("^", "$") and row[1:-1] in line for row in found)
    starts = sorted(line.index(row[1:-1]) for row in found)
    assert starts[1] - starts[0] == 5


def test_packed_documents_stay_whole(tmp_path: Path):
    """The picture, and one that is cut because it is longer than a row."""
    stream = stream_of(tmp_path, "abc#", "hi#", "klm#", "efghijklmabc#")
    rows = FramedDocuments(stream, PackSampler(np.array([4, 3, 4, 13]), 7, seed=1), Frame.of(9, ROLES))
    tokens, lengths = rows(0, rows.rows_per_epoch)
    found = {row[:length]: row[length:] for row, length in zip(spelled(tokens), lengths.tolist(), strict=True)}
    assert {*found} == {"^efghijk$", "^lmabc#$", "^abc#hi#$", "^klm#$"} or {*found} == {
        "^efghijk$", "^lmabc#$", "^klm#hi#$", "^abc#$"
    }  # fmt: skip
    assert {length: {*rest} for length, rest in found.items() if rest}.popitem()[1] == {"."}


def test_a_frame_of_what_the_tokenizer_has():
    assert Frame.of(8, ROLES) == Frame(8, 0, 1, 3)
    assert Frame.of(8, {"eos": 4}) == Frame(8, 4, 4, 4)
    assert Frame.of(8, {"bos": 5, "eos": 4, "pad": 6}) == Frame(8, 5, 4, 6)


def source_of(folder: Path, microbatch: int = 0, masking: Masking = MASKING) -> MaskedSource:
    stream = stream_of(folder, *("abcdefghijklm#" * 5,) * 3)
    rows: TextRows = FramedWindows(stream, WindowSampler(len(stream), 6, seed=1), Frame.of(8, ROLES))
    return MaskedSource(stream, rows, masking, Feed(8, 1, 10, microbatch))


def test_an_epoch_masks_anew_what_the_one_before_showed(tmp_path: Path):
    """Every row has its own masks in every epoch; under the masks lies the text."""
    source = source_of(tmp_path)
    epoch = source.rows_per_epoch // 10
    masks: dict[str, list] = {}
    for step in source.block(0, 6 * epoch, 0):
        (batch,) = source.batches(step.content, CPU)
        assert batch.target_tokens == len(batch.places) == 10 * 2
        for row, seen in zip(unmasked(batch), spelled(batch.tokens), strict=True):
            masks.setdefault(row, []).append(seen)
    assert max(len({*seen}) for seen in masks.values()) > 3


def test_the_fingerprint_sees_the_masks(tmp_path: Path):
    """Runs that read the same rows in the same order, and hide other tokens, or the same behind others, or none."""

    def fingerprint(microbatch: int = 0, **options: float) -> int:
        masking = Masking(MaskOptions(**options), 2, np.arange(len(LETTERS)) < 5, None)
        return source_of(tmp_path, microbatch, masking).block(0, 1, 0)[0].fingerprint

    assert fingerprint() == fingerprint(microbatch=5)
    told = [{}, {"random": 0.2}, {"share": 0.5}, {"masked": 0, "random": 0}, {"masked": 0, "random": 0, "share": 0.5}]
    assert len({fingerprint(**options) for options in told}) == len(told)


# --- evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["abcdefghijklm#" * 3, "abcdefghijklm#abcd", "ab", "abcdef"])
def test_an_evaluation_reads_every_token_once_with_the_same_masks(tmp_path: Path, text: str):
    stream, frame = stream_of(tmp_path, text, split="val"), Frame.of(8, ROLES)

    def read(rows: int, size: int) -> list[tuple[str, str]]:
        batches = [b for rank in range(size) for b in eval_masked(stream, frame, MASKING, rows, rank, size)]
        assert all(batch.tokens.shape[1] == 8 for batch in batches)
        return [pair for b in batches for pair in zip(unmasked(b), spelled(b.tokens), strict=True)]

    alone = read(100, 1)
    assert len(alone) == eval_rows_of(stream, frame)
    assert "".join(row.strip("^$.") for row, _ in alone) == text
    for rows, size in ((1, 1), (2, 1), (3, 2), (1, 4), (2, 3)):
        assert read(rows, size) == alone


def test_a_batch_in_which_nothing_can_be_told():
    tokens = np.zeros((2, 3), np.int64)
    batch = masked_batch(tokens, np.full_like(tokens, IGNORE), np.array([3, 3]))
    assert (batch.target_tokens, batch.places.tolist(), batch.targets.tolist()) == (0, [0], [IGNORE])
