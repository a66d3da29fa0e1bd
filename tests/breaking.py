"""Real training in which one rank breaks at a chosen place: what to start in place of ``python -m hvdtrain``."""

import sys

# The third time that the rank comes past it; fsync is that of its part of the first checkpoint. A pass back is the
# second of four of the third step, on the last rank of a pipeline: others come after it.
PLACES = {
    "start": "__main__.cli.run = breaking(__main__.cli.run, 1)",
    "joined": "config.load_config = breaking(config.load_config, 1)",
    "data": "TrainLoader.next_step = breaking(TrainLoader.next_step, 3)",
    "first step": "Engine.forward_backward = breaking(Engine.forward_backward, 1)",
    "compute": "Engine.forward_backward = breaking(Engine.forward_backward, 3)",
    "pass back": "_Step._backward = breaking(_Step._backward, 10)",
    "evaluation": "Engine.evaluate = breaking(Engine.evaluate, 1)",
    "left": "from hvdtrain.comm import mpi; mpi.LEAVE_S = 4; sys.exit = breaking(sys.exit, 1)",
    "saving": "os.fsync = breaking(os.fsync, 1)",
}
TROUBLES = {
    "error": "raise RuntimeError('oh')",
    "memory": "raise MemoryError('oh')",
    "sys.exit": "sys.exit(3)",
    "os._exit": "os._exit(3)",
    "leaves": "os._exit(0)",
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "segfault": "ctypes.string_at(0)",
    "stop": "os.kill(os.getpid(), signal.SIGSTOP)",
    "hang": "time.sleep(600)",
    "locked hang": "time.sleep(1); ctypes.PyDLL(None).sleep(600)",  # without letting go of Python's lock
}
# The file "trouble" tells when it was.
_CODE = """
import ctypes, os, resource, signal, sys, time
from hvdtrain import __main__
from hvdtrain.comm.world import detect_world

def break_it():
    open("trouble", "w").close()
    {trouble}

def breaking(function, turn):
    turns = []
    def broken(*args, **named):
        turns.append(1)
        if len(turns) == turn and detect_world().rank == {rank}:
            break_it()
        return function(*args, **named)
    return broken

place = {place!r}
if "config." in place:
    from hvdtrain import config
if "Engine." in place:
    from hvdtrain.engine import Engine
if "_Step." in place:
    from hvdtrain.cut.pipeline import _Step
if "TrainLoader." in place:
    from hvdtrain.data.loader import TrainLoader
exec(place)
sys.exit(__main__.main())
"""


def program(trouble: str, place: str, rank: int = 1) -> tuple[str, ...]:
    """``launch(..., program=program("kill", "data"))``; trouble: of TROUBLES, or code of one line."""
    code = _CODE.format(trouble=TROUBLES.get(trouble, trouble), place=PLACES[place], rank=rank)
    return (sys.executable, "-c", code)
