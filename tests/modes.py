"""Every way in which replicas agree, as words of a command; and many commands in one process of each rank."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from launch import Done, launch

_SIGNS = ("optim.name=sgd", "optim.momentum=0", "optim.clip_norm=0", "optim.lr=3e-4")
_LOCAL = ("sync.name=local_sgd", "sync.local_sgd.every=4")
_SERVER = "sync.name=parameter_server"
_APART = (_SERVER, "sync.parameter_server.servers=1")
_ASYNC = (*_APART, "sync.parameter_server.mode=asynchronous")
MODES: Mapping[str, tuple[str, ...]] = {
    "allreduce": (),
    "zero": ("sync.name=zero",),
    "powersgd": ("sync.name=powersgd",),
    "sign": ("sync.name=sign", *_SIGNS),
    "topk": ("sync.name=topk", "sync.topk.share=0.05"),
    "local_sgd": (*_LOCAL, "sync.local_sgd.optimizer=kept"),
    "diloco": (*_LOCAL, "sync.local_sgd.outer=nesterov"),
    "gossip": ("sync.name=gossip",),
    "gossip-push": ("sync.name=gossip", "sync.gossip.push=true", "sync.gossip.every=3"),
    "average": ("sync.name=average",),
    "server": (_SERVER,),
    "server-apart": _APART,
    "server-async": _ASYNC,
}
# Workers that take rows at their own pace: each row once, but no run is the same twice. Of three ranks, for of two one
# alone takes rows.
RACING: Mapping[str, tuple[str, ...]] = {"server-racing": _ASYNC}
ALL = {**MODES, **RACING}


def ranks_of(mode: str) -> int:
    """On how many ranks it is tried."""
    return 3 if mode in RACING else 2


class Row(NamedTuple):
    """A command. ``stop_at``: a step before whose end rank 1 gets TERM; 0: none."""

    words: tuple[Any, ...]
    stop_at: int = 0


_PROGRAM = """
import contextlib, json, os, signal, sys
from hvdtrain.machine.cores import set_library_threads
set_library_threads(os.environ)
from hvdtrain import train
from hvdtrain.__main__ import main
from hvdtrain.comm.world import detect_world
from hvdtrain.engine import Engine

rank, group = detect_world().rank, None
open_group, forward_backward = train.open_group, Engine.forward_backward

with contextlib.ExitStack() as opened:
    @contextlib.contextmanager
    def open_once(world, *_, **__):
        global group
        group = group or opened.enter_context(open_group(world))
        yield group

    def stopping(engine, microbatches, task, step, *place):
        if step == stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(engine, microbatches, task, step, *place)

    train.open_group, Engine.forward_backward = open_once, stopping
    codes = []
    for words, stop_at in json.loads(sys.argv[1]):
        codes.append(main(words))
    everyone = group.all_gather_object(codes)
    assert all(other == codes for other in everyone), everyone
    if rank == 0:
        print("exit codes", json.dumps(codes))
"""


def in_one_go(
    rows: Iterable[Row], ranks: int = 2, timeout_s: float = 240, how: str = "mpirun"
) -> tuple[list[int], Done]:
    """Run them one after another in the same ranks: loading torch takes longer than all of them. Returns exit codes,
    which are the same on all ranks.
    """
    words = json.dumps([[[str(word) for word in row.words], row.stop_at] for row in rows])
    done = launch(words, program=(sys.executable, "-c", _PROGRAM), how=how, ranks=ranks, timeout_s=timeout_s)
    assert done.exit_code == 0, done
    (line,) = [line for line in done.text.splitlines() if line.startswith("exit codes")]
    return json.loads(line.removeprefix("exit codes")), done
