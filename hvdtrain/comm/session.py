"""Join the world, and leave it in good order whatever happens.

all ranks fail at the same point     rank 0 says why; all close and exit with the error's code
one rank fails alone                 it says why, with its rank and host, and ends the whole job at once
a rank loses another one             it waits for the launcher to end it: the lost one's message shall be the last
some are lost, and all is saved      each of the others leaves without meeting any
a rank does not come, or not leave   the others give up after a limit
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from hvdtrain.comm.mpi import LEAVE_S
from hvdtrain.comm.ranks import OneRank, Ranks
from hvdtrain.comm.world import World
from hvdtrain.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    HvdtrainError,
    RankLostError,
    WithoutOthersError,
    crash_code,
    describe,
    describe_crash,
    is_out_of_memory,
    report,
    say_from,
)

if TYPE_CHECKING:
    from hvdtrain.comm.group import Group

AnyRanks = TypeVar("AnyRanks", bound=Ranks)

_JOIN_S = 1800.0  # for all ranks to start; thousands of them read the same libraries
_LOST_S = 5.0  # in which the launcher ends a rank that has lost another one


@contextmanager
def open_group(
    world: World, timeline: bool = False, parts: bool = False, topology: str | None = None
) -> "Iterator[Group]":
    """Yield the group of all ranks (collective). Horovod and MPI are loaded only where there is more than one.

    timeline: whether ``Group.start_timeline`` will be called; parts: whether ``Group.split`` may be. topology: see
    ``HorovodGroup``.
    """
    from hvdtrain.comm.horovod_group import HorovodGroup
    from hvdtrain.comm.local_group import LocalGroup

    if world.size == 1:
        group: Group = LocalGroup()
    else:
        with _within(_JOIN_S, world, "not all ranks have started"):
            group = HorovodGroup(world, timeline, parts, topology)
    with _in_good_order(group, world):
        yield group


@contextmanager
def open_ranks(world: World) -> Iterator[Ranks]:
    """Like ``open_group`` for work without tensors: over MPI alone, without torch and Horovod (collective)."""
    from hvdtrain.comm.mpi import MpiRanks

    if world.size == 1:
        ranks: Ranks = OneRank()
    else:
        with _within(_JOIN_S, world, "not all ranks have started"):
            ranks = MpiRanks(world)
    with _in_good_order(ranks, world):
        yield ranks


@contextmanager
def _in_good_order(group: AnyRanks, world: World) -> Iterator[AnyRanks]:
    """Yield the group, and end it as the table above says."""
    _show_stacks_of_crashes()
    if group.size == 1:
        yield group
        return
    try:
        yield group
    except HvdtrainError as error:
        if error.on_all_ranks:
            # The launcher ends the others as soon as the first has left; let each leave with its own exit code.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            report(error, world.is_main)
            with _within(LEAVE_S, world, "not all ranks leave", error.exit_code), contextlib.suppress(RankLostError):
                group.barrier()  # none leaves before rank 0 has spoken
                if world.launcher == "mpirun":
                    _leave_without_banner(group, world, error.exit_code)
                group.close()
            raise
        if isinstance(error, WithoutOthersError):
            report(error, world.is_main)
            sys.stdout.flush()
            os._exit(error.exit_code)
        if isinstance(error, RankLostError):
            _wait_for_the_launcher()
        say_from(world.rank, describe(error))
        group.abort(error.exit_code)
    except KeyboardInterrupt:
        group.abort(EXIT_INTERRUPTED)
    except BaseException as error:
        if not is_out_of_memory(error):
            traceback.print_exc()
        say_from(world.rank, describe_crash(error))
        group.abort(crash_code(error))
    else:
        with _within(LEAVE_S, world, "not all ranks leave"):
            group.close()


def _leave_without_banner(group: Ranks, world: World, exit_code: int) -> None:
    """Let rank 0 end all ranks (collective). Of ranks that leave by themselves mpirun prints ten lines of its own."""
    sys.stdout.flush()
    group.barrier()
    if world.is_main:
        group.abort(exit_code)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(exit_code))
    time.sleep(LEAVE_S)


def _wait_for_the_launcher() -> None:
    """Wait for the launcher to end this rank, which has lost another one; return if it does not.

    The lost rank has said what went wrong, or was killed, and then the launcher names it: this rank has nothing to add.
    It leaves by ``os._exit``, because a shell reports a process that SIGTERM has ended as "Terminated".
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_CRASH))
    time.sleep(_LOST_S)


@contextmanager
def _within(seconds: float, world: World, trouble: str, exit_code: int = EXIT_CRASH) -> Iterator[None]:
    """Run a block that waits for other ranks. After ``seconds`` say ``trouble`` and end this process.

    Without a limit it would wait for ever where a rank is stopped or hangs.
    """

    def give_up() -> None:
        say_from(world.rank, f"{trouble} within {seconds:g} s", past_locks=True)
        os._exit(exit_code)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _show_stacks_of_crashes() -> None:
    """Print Python's stacks where C code crashes. To be called once MPI has started, which would complain otherwise."""
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no standard error
            faulthandler.enable(sys.__stderr__)
