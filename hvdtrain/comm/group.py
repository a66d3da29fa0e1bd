"""The contract: what every set of ranks that talks to one another can do.

Every method that is not marked *local* is a collective: all ranks of the group call it, in the same order.
"""

import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from hvdtrain.errors import EXIT_CRASH, EXIT_USAGE, HvdtrainError, RankError

T = TypeVar("T")


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the tensor that was handed over holds the result."""


class Group(ABC):
    """Ranks ``0 .. size-1``. ``backend`` names what carries the bytes, for the run's record."""

    rank: int
    size: int
    backend: str

    @abstractmethod
    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        """Start summing ``tensor`` (contiguous; fp32, fp64, fp16 or integer) over all ranks, in place.

        Ranks may start their tensors in any order: they are matched by ``name``.
        """

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        """Copy ``tensor`` (contiguous) from ``root`` to all ranks, in place."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Each rank's (picklable, small) value, in rank order, on all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Leave in good order, together with the others."""

    def all_reduce_sum(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place."""
        self.all_reduce_sum_async(tensor, name).wait()
        return tensor

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_gather_object(None)

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it fails anywhere, fail everywhere with the lowest rank's message.

        The ranks meet after ``work``, which must therefore hold no collective of its own. An error of one rank alone
        so ends the job at once, instead of leaving the others waiting.
        """
        result, failure = None, None
        try:
            result = work()
        except HvdtrainError as error:
            failure = (f"{type(error).__name__}: {error}", error.exit_code)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            failure = (f"{type(error).__name__}: {error}", EXIT_CRASH)
        for rank, other in enumerate(self.all_gather_object(failure)):
            if other is not None:
                message, exit_code = other
                raise RankError(message + (f" (on rank {rank})" if rank else ""), exit_code)
        return result  # type: ignore[return-value]

    def agree(self, value: Any, what: str) -> None:
        """Check that ``value`` is the same on all ranks; otherwise RankError naming the first rank that differs.

        Of flat mappings only the keys that differ are shown.
        """
        for rank, other in enumerate(values := self.all_gather_object(value)):
            if other != values[0]:
                mine, theirs = values[0], other
                if isinstance(mine, dict) and isinstance(theirs, dict):
                    keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
                    mine, theirs = ({key: side.get(key) for key in keys} for side in (mine, theirs))
                raise RankError(
                    f"{what} differs between ranks: rank 0 has {mine!r}, rank {rank} has {theirs!r}", EXIT_USAGE
                )
