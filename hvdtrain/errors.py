"""Errors a user can act on, each with the exit code that a batch script reads.

An error of this family is printed as one message without a traceback, by one rank, and every rank exits with its
code. Anything else that escapes is a crash: exit code 70 and a traceback.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import time

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_BAD_DATA = 65
EXIT_CRASH = 70
EXIT_OUT_OF_MEMORY = 71  # the same settings on the same nodes will not fit another time either
EXIT_IO = 74
EXIT_STOPPED_EARLY = 75
EXIT_DIVERGED = 76
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells count it
# The same command would end so another time: no script starts it again by itself.
FINAL_EXITS = (EXIT_USAGE, EXIT_BAD_DATA, EXIT_OUT_OF_MEMORY, EXIT_IO, EXIT_DIVERGED, EXIT_INTERRUPTED)


class HvdtrainError(Exception):
    """Base of all errors that carry a message for the user."""

    exit_code = EXIT_CRASH
    # True: every rank raises this at the same point, so all can leave in good order and rank 0 alone speaks.
    on_all_ranks = False


class ConfigError(HvdtrainError):
    """Wrong use: an unknown option, a value that cannot be, a batch that the ranks cannot share."""

    exit_code = EXIT_USAGE


class LaunchError(ConfigError):
    """The launcher and this process disagree about how many ranks there are; ``rank`` is what the launcher says."""

    def __init__(self, message: str, rank: int = 0):
        super().__init__(message)
        self.rank = rank


class DataError(HvdtrainError):
    """Input text, shards or a tokenizer that are missing, damaged or not what the run needs."""

    exit_code = EXIT_BAD_DATA


class CheckpointError(HvdtrainError):
    """A checkpoint or run folder that cannot be read, or that belongs to another recipe."""

    exit_code = EXIT_BAD_DATA


class OutputError(HvdtrainError):
    """Writing failed, or a file system does not tell what is there: disk full, quota, read-only, I/O errors."""

    exit_code = EXIT_IO


class DivergedError(HvdtrainError):
    """The loss or a gradient is no longer a finite number."""

    exit_code = EXIT_DIVERGED
    on_all_ranks = True


class RankLostError(HvdtrainError):
    """A collective broke: another rank died or left."""


class WithoutOthersError(HvdtrainError):
    """All that is left of the run is saved, but some ranks cannot come to an end any more: each of the others leaves by
    itself.
    """

    exit_code = EXIT_STOPPED_EARLY


class ReplicaError(HvdtrainError):
    """Replicas that must be equal bit by bit are not; the message names the ranks and the first tensor."""

    on_all_ranks = True


class MemoryLimitError(HvdtrainError):
    """The host or the GPU has no more memory. Trying again does not help; the message says what to lower."""

    exit_code = EXIT_OUT_OF_MEMORY


class RankError(HvdtrainError):
    """Some rank failed, and all ranks know it: each raises this, with the lowest such rank's message and exit code."""

    on_all_ranks = True

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def report(error: HvdtrainError, is_main: bool) -> None:
    """Let rank 0 print ``error``, unless it was printed before."""
    if is_main and getattr(error, "rank", 0) == 0 and not getattr(error, "reported", False):
        say(describe(error))
    error.reported = True  # type: ignore[attr-defined]


def describe(error: HvdtrainError) -> str:
    kind = type(error).__name__
    return str(error) if kind == "RankError" else f"{kind}: {error}"  # a RankError carries its kind in its message


def describe_crash(error: BaseException) -> str:
    """An error that is not of our own making, in one line."""
    first, *_ = str(error).strip().splitlines() or [""]
    kind = "out of memory: " if is_out_of_memory(error) else ""
    return f"{kind}{type(error).__name__}" + (f": {first}" if first else "")


def crash_code(error: BaseException) -> int:
    """The exit code of an error that is not of this family."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_OUT_OF_MEMORY if is_out_of_memory(error) else EXIT_CRASH


_ONEDNN = "could not create a primitive"  # which it says where there is no room for one


def is_out_of_memory(error: BaseException) -> bool:
    """Does Python, numpy, torch or CUDA say so? It does not load torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("DefaultCPUAllocator: can't allocate memory", "out of memory", "_ALLOC_FAILED", _ONEDNN)
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def let_rank_0_speak() -> None:
    """Wait a moment before this rank leaves without having joined the others.

    The launcher ends all ranks as soon as the first has left: rank 0 must have spoken by then. The launcher's signal is
    ignored, so that each rank leaves with its own exit code.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(2)  # ranks of a busy node start up to a second apart


def give_up_output() -> None:
    """Lead standard output nowhere. What it still holds back would fail as Python exits, with a complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def plural(number: int, noun: str, form: str = "") -> str:
    """``1 rank``, ``2 ranks``; form: of the number, as ``format`` takes it: ``,`` for 1,000 ranks."""
    return f"{number:{form}} {noun}{'' if number == 1 else 's'}"


def say(message: str) -> None:
    """Print one line on standard error: after all that was printed on standard output, and above a progress bar."""
    line = f"hvdtrain: {message}\n"  # in one write, or launchers cut it where they add the rank
    with contextlib.suppress(OSError):  # a log whose disk is full is not worth a run
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        if "tqdm" in sys.modules and sys.stderr.isatty():
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr, end="")
        else:
            sys.stderr.write(line)
        sys.stderr.flush()


def say_from(rank: int, message: str, past_locks: bool = False) -> None:
    """``say`` by a rank that speaks for itself: its number and host before the message.

    past_locks: write around sys.stderr, whose lock may be held for ever by a thread that is stuck.
    """
    message = f"[rank {rank} on {socket.gethostname()}] {message}"
    if not past_locks:
        say(message)
        return
    with contextlib.suppress(OSError):
        os.write(2, f"hvdtrain: {message}\n".encode())
