"""End all ranks of an MPI job from one of them, so that its own message stays the last line of the log."""

import ctypes
import os
import threading
import time
from types import ModuleType
from typing import NoReturn

_PATIENCE_S = 10.0
_SAY_S = 0.5  # for what was said to reach the log: srun drops what is still on its way when it ends a step


def end_all_ranks(mpi: ModuleType, exit_code: int) -> NoReturn:
    """Let ``mpi`` (``mpi4py.MPI``) tell the launcher to end the job; does not return (local; any thread).

    Open MPI's ``MPI_Abort`` prints eight lines below the caller's message, and then calls ``ompi_mpi_abort``. Where the
    library has that function, it is called at once.
    """
    # Where another thread keeps MPI busy, it never answers. This process then exits, and the launcher sees its code.
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
