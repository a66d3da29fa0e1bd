"""The smallest contract of a set of ranks: they exchange small objects, agree, and fail together.

Every method that is not marked *local* is a collective: all ranks call it, in the same order.
"""

import os
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from hvdtrain.errors import EXIT_USAGE, HvdtrainError, RankError, crash_code, describe_crash, is_out_of_memory

T = TypeVar("T")


class Pending(Protocol):
    """Something under way between ranks."""

    def done(self) -> bool:
        """Would ``wait`` return at once? (local)"""

    def wait(self) -> None:
        """Block until the tensor that was handed over holds the result, or may be written to again."""


class Done:
    """Something that needs nobody else."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Ranks(ABC):
    """Ranks ``0 .. size-1``."""

    rank: int
    size: int

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Each rank's (picklable, small) value, in rank order, on all ranks."""

    @abstractmethod
    def close(self) -> None:
        """Leave in good order, together with the others."""

    def abort(self, exit_code: int) -> None:
        """End the whole job now, from one rank (local)."""
        os._exit(exit_code)

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
            if not is_out_of_memory(error):
                traceback.print_exc(file=sys.stderr)
            failure = (describe_crash(error), crash_code(error))
        for rank, other in enumerate(self.all_gather_object(failure)):
            if other is not None:
                message, exit_code = other
                raise RankError(message + (f" (on rank {rank})" if rank else ""), exit_code)
        return result  # type: ignore[return-value]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """``together`` of work that rank 0 does for all: its result there, None on the others."""
        return self.together(lambda: work() if self.rank == 0 else None)

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


class OneRank(Ranks):
    """The single process that is the whole world."""

    rank = 0
    size = 1

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        pass
