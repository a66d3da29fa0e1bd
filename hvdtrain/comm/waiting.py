"""Waiting for messages asleep: MPI's and Horovod's own waits take a core away from the work of others."""

import time

from hvdtrain.comm.ranks import Pending

_PERIOD_S = 5e-5  # between two looks


def wait_for(pending: Pending) -> None:
    """What ``pending.wait()`` does."""
    while not pending.done():
        nap()
    pending.wait()


def nap() -> None:
    """Until it is worth looking again."""
    time.sleep(_PERIOD_S)
