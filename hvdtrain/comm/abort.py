"""End all ranks of an MPI job from one of them, without a word more than its own."""

import ctypes
import os
import threading
import time
from types import ModuleType
from typing import NoReturn

_PATIENCE_S = 10.0
_SAY_S = 0.5  # for what was said to reach the log: srun drops what is still on its way when it ends a step


def end_all_ranks(mpi: ModuleType, exit_code: int) -> NoReturn:
    """Through ``mpi`` (``mpi4py.MPI``), which tells the launcher (local; any thread).

    The last line of the log shall be the message that the caller has just printed. Open MPI's ``MPI_Abort`` prints
    eight lines after it, and then calls a function of its own: where that is there, it is called here.
    """
    # MPI may be in another thread's hands and never answer. The launcher then sees the exit code alone.
    timer = threading.Timer(_PATIENCE_S, os._exit, (exit_code,))
    timer.daemon = True
    timer.start()
    time.sleep(_SAY_S)
    world = mpi.COMM_WORLD
    try:
        abort = ctypes.CDLL(mpi.__file__).ompi_mpi_abort  # looked up in the libraries that mpi4py was linked with
    except (OSError, AttributeError):
        world.Abort(exit_code)
    else:
        abort(ctypes.c_void_p.from_address(mpi._addressof(world)), ctypes.c_int(exit_code))
    os._exit(exit_code)
