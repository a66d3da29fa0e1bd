"""Turns the sampler's rows into microbatches on the device, and keeps the proof of what was consumed."""

from collections.abc import Iterator

import numpy as np
import torch

from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.data.sampler import Share, WindowSampler, even_parts, mix
from hvdtrain.data.shards import TokenStream

_MASK = (1 << 64) - 1


class TrainLoader:
    """Yields this rank's share of one optimizer step after another. Its whole state is ``rows_consumed``.

    ``fingerprint`` proves the order: a sum, modulo 2**64, of one number for each row that this rank was given, made of
    the row's tokens and of its turn in the whole training. The sum over ranks is therefore equal for every rank count,
    and changes with any token and with any swap.
    """

    def __init__(
        self, stream: TokenStream, sampler: WindowSampler, share: Share, global_batch: int, device: torch.device
    ):
        self._stream, self._sampler, self._share, self._device = stream, sampler, share, device
        self._global_batch = global_batch
        self._weights = mix(np.arange(sampler.context + 1), 1) | np.uint64(1)  # odd: no change is multiplied away
        self.rows_consumed = 0
        self.fingerprint = 0

    @property
    def epoch(self) -> int:
        return self.rows_consumed // self._sampler.rows_per_epoch

    def next_step(self) -> list[Batch]:
        """The microbatches of the next optimizer step, in order."""
        first = self.rows_consumed + self._share.first
        starts = self._sampler.starts(first, self._share.count)
        windows = self._stream.windows(starts, self._sampler.context + 1)
        self._add_fingerprint(windows, first)
        self.rows_consumed += self._global_batch
        cuts = range(0, self._share.count, self._share.microbatch)
        return [Batch.from_windows(windows[cut : cut + self._share.microbatch], self._device) for cut in cuts]

    def _add_fingerprint(self, windows: np.ndarray, first: int) -> None:
        # Tokens are taken eight bytes at a time; what is left over, one by one.
        width = windows.shape[1]
        per_word = 8 // windows.itemsize
        packed = width // per_word
        words = windows[:, : packed * per_word].view(np.uint64)
        content = (words * self._weights[:packed]).sum(axis=1, dtype=np.uint64)
        rest = windows[:, packed * per_word :].astype(np.uint64)
        content += (rest * self._weights[packed : packed + rest.shape[1]]).sum(axis=1, dtype=np.uint64)
        turns = mix(np.arange(first, first + len(windows)), 2)
        self.fingerprint = (self.fingerprint + int(mix(content ^ turns, 3).sum(dtype=np.uint64))) & _MASK


def eval_batches(
    stream: TokenStream, context: int, rows_per_batch: int, rank: int, size: int, device: torch.device
) -> Iterator[Batch]:
    """This rank's part of a whole split: every token but the first is a target exactly once, for any ``size``.

    The last window of the split may be shorter: it is filled up with targets that do not count.
    """
    targets = len(stream) - 1
    rows = -(-targets // context)
    first, count = even_parts(rows, size)[rank]
    for start in range(first, first + count, rows_per_batch):
        numbers = np.arange(start, min(start + rows_per_batch, first + count))
        whole = numbers[(numbers + 1) * context <= targets]
        if len(whole):
            yield Batch.from_windows(stream.windows(whole * context, context + 1), device)
        if len(whole) < len(numbers):
            yield _padded(stream, int(numbers[-1]) * context, context, device)


def _padded(stream: TokenStream, start: int, context: int, device: torch.device) -> Batch:
    window = stream.windows(np.array([start]), len(stream) - start).astype(np.int64)
    counted = window.shape[1] - 1
    tokens = torch.zeros(1, context, dtype=torch.int64)
    targets = torch.full((1, context), IGNORE, dtype=torch.int64)
    tokens[0, :counted] = torch.from_numpy(window[0, :-1])
    targets[0, :counted] = torch.from_numpy(window[0, 1:])
    return Batch(tokens.to(device), targets.to(device), counted)
