"""Join the world, and leave it in good order whatever happens.

all ranks fail at the same point     rank 0 says why; all close and exit with the error's code
one rank fails alone                 it says why, with its rank and host, and ends the whole job at once
"""

import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from hvdtrain.comm.cores import take_cores
from hvdtrain.comm.ranks import OneRank, Ranks
from hvdtrain.comm.world import World
from hvdtrain.errors import EXIT_CRASH, EXIT_INTERRUPTED, HvdtrainError, describe, report, say

if TYPE_CHECKING:
    from hvdtrain.comm.group import Group

AnyRanks = TypeVar("AnyRanks", bound=Ranks)


@contextmanager
def open_group(world: World, timeline: bool = False) -> "Iterator[Group]":
    """Yield the group of all ranks (collective). Horovod and MPI are loaded only where there is more than one.

    timeline: whether ``Group.start_timeline`` will be called.
    """
    from hvdtrain.comm.horovod_group import HorovodGroup
    from hvdtrain.comm.local_group import LocalGroup

    with _in_good_order(LocalGroup() if world.size == 1 else HorovodGroup(world, timeline), world) as group:
        yield group


@contextmanager
def open_ranks(world: World) -> Iterator[Ranks]:
    """Like ``open_group`` for work without tensors: over MPI alone, without torch and Horovod (collective)."""
    from hvdtrain.comm.mpi import MpiRanks

    with _in_good_order(OneRank() if world.size == 1 else MpiRanks(world), world) as ranks:
        yield ranks


@contextmanager
def _in_good_order(group: AnyRanks, world: World) -> Iterator[AnyRanks]:
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
            group.barrier()  # none leaves before rank 0 has spoken
            group.close()
            raise
        say(f"[rank {world.rank} on {socket.gethostname()}] {describe(error)}")
        group.abort(error.exit_code)
    except KeyboardInterrupt:
        group.abort(EXIT_INTERRUPTED)
    except BaseException as error:
        traceback.print_exc()
        say(f"[rank {world.rank} on {socket.gethostname()}] {type(error).__name__}: {error}")
        group.abort(EXIT_CRASH)
    else:
        group.close()


def threads_of_rank(group: Ranks) -> int:
    """Compute threads for this rank (collective): its share of the physical cores open to it and its neighbours.

    OMP_NUM_THREADS, where set, is obeyed. A launcher that binds ranks to cores of their own is respected.
    """
    return take_cores(group, bind=False).threads
