"""What a microbatch is: the tensors that a task's loss reads."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Self

import numpy as np
import torch

from hvdtrain.data.sampler import mix

IGNORE = -100  # a target that does not count; torch's cross-entropy skips it


@dataclass(frozen=True)
class AnyBatch:
    """``target_tokens``: how many targets count; known on the host, so that no one has to ask the device."""

    _on_host: ClassVar[tuple[str, ...]] = ()  # tensors that no device needs

    @property
    def rows_at_once(self) -> int:
        """In evaluation, how many of its rows a model takes at once; 0: all."""
        return 0

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor], but: tuple[str, ...] = ()) -> Self:
        values = ((field.name not in but, getattr(self, field.name)) for field in fields(self))
        return type(self)(*(change(v) if mine and isinstance(v, torch.Tensor) else v for mine, v in values))

    def to(self, device: torch.device) -> Self:
        """The same on ``device``; the copy may still be under way."""
        if device.type == "cpu":
            return self
        return self._each(lambda tensor: tensor.to(device, non_blocking=True), but=self._on_host)

    def pinned(self) -> Self:
        """The same in page-locked memory, from where a GPU fetches by itself."""
        return self._each(torch.Tensor.pin_memory)


@dataclass(frozen=True)
class Batch(AnyBatch):
    """``tokens`` and ``targets``: int64 [B, T]; ``targets[b, t]`` is what follows ``tokens[b, t]``, or IGNORE.

    Packed rows also have ``positions``, int64 [B, T]: places within a document, and ``segments``, int64 [B, T]: which
    document of the row a token belongs to, -1 for padding. ``segments`` stay on the host, where attention asks them
    for the documents' ends without waiting for a device.
    """

    _on_host: ClassVar[tuple[str, ...]] = ("segments",)

    tokens: torch.Tensor
    targets: torch.Tensor
    target_tokens: int
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    @classmethod
    def from_windows(cls, windows: np.ndarray) -> "Batch":
        """windows: [B, T + 1] token ids; each gives T inputs and T targets."""
        ids = torch.from_numpy(windows.astype(np.int64))
        return cls(ids[:, :-1], ids[:, 1:], windows.shape[0] * (windows.shape[1] - 1))


@dataclass(frozen=True)
class MaskedBatch(AnyBatch):
    """``tokens``: int64 [B, T], some of them hidden; ``lengths``: int64 [B]. ``places``: int64 [M], where in the B x T
    tokens something is to be told; ``targets``: int64 [M], what, or IGNORE.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    places: torch.Tensor
    targets: torch.Tensor
    target_tokens: int


class DocumentBatch(AnyBatch):
    """A batch of whole documents, padded to the longest of them."""

    def fingerprints(self, of_tokens: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A number for each row, the same however wide the batch is padded: uint64 [rows].

        of_tokens: such numbers of integers [rows, T], of which 0 at the end changes nothing.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class PairBatch(DocumentBatch):
    """``source``: int64 [B, S], ``source_lengths``: int64 [B]; ``tokens`` and ``targets`` as in Batch."""

    source: torch.Tensor
    source_lengths: torch.Tensor
    tokens: torch.Tensor
    targets: torch.Tensor
    target_tokens: int

    def fingerprints(self, of_tokens: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        targets = torch.where(self.targets == IGNORE, 0, self.targets + 1)
        return of_tokens(from_1(self.source, self.source_lengths)) + mix(of_tokens(targets.numpy()), 5)


@dataclass(frozen=True)
class LabelBatch(DocumentBatch):
    """``tokens``: int64 [B, T], ``lengths``: int64 [B]; ``types``: int64 [B, T], 1 where a second text stands, else 0.

    ``labels``: int64 [B], the number of each text's label; where a text may have several [B, C], 1 for each that it
    has, else 0; IGNORE in a row that does not count. ``weights``: fp32 of the same shape, what the loss of each is
    multiplied by in training; None: 1. ``target_tokens``: labels that count.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    types: torch.Tensor
    labels: torch.Tensor
    target_tokens: int
    weights: torch.Tensor | None = None

    def fingerprints(self, of_tokens: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        labels = self.labels.numpy()
        if labels.ndim == 1:
            return of_tokens(from_1(self.tokens, self.lengths)) + mix(labels, 5)
        each = mix(labels, 5 + np.arange(labels.shape[1]))
        return of_tokens(from_1(self.tokens, self.lengths)) + each.sum(axis=1, dtype=np.uint64)


def from_1(tokens: torch.Tensor, lengths: torch.Tensor) -> np.ndarray:
    """Tokens counted from 1, so that a token 0 at the end is told from padding."""
    return torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens + 1, 0).numpy()
