"""``python -m hvdtrain`` with a death in it: SIGKILL at a named place of one rank's n-th save.

python dying.py '{"rank": 0, "place": "before manifest", "turn": 3}' train ...
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What every rank comes past when it saves, and what only rank 0 does.
PLACES = ("before part", "torn part", "after part", "before digest", "after digest")
PLACES_OF_MAIN = (
    *PLACES,
    "before folder",
    "after folder",
    "before manifest",
    "torn manifest",
    "after manifest",
    "before rename",
    "after rename",
    "in dropping",  # an old one has lost its name, its files are still there
)
_FUNCTIONS = {
    "part": "save_file",
    "digest": "file_sha256",
    "folder": "begin",
    "manifest": "write_json",
    "rename": "_publish",
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _dying_in(function: Callable, when: str, turn: int) -> Callable:
    turns = []

    def broken(*args: Any, **named: Any) -> Any:
        turns.append(1)
        if len(turns) == turn:
            if when == "before":
                die()
            if when == "torn":  # the first half is there
                path = args[1] if function.__name__ == "save_file" else _temporary(args[0])
                function(*args, **named) if path is args[1] else path.write_text(json.dumps(args[1]))
                os.truncate(path, path.stat().st_size // 2)
                die()
        result = function(*args, **named)
        if len(turns) == turn:
            die()
        return result

    return broken


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _dying_in_dropping(turn: int) -> None:
    rmtree, turns = shutil.rmtree, []

    def broken(path: Any, *args: Any, **named: Any) -> None:
        if str(path).endswith(".old") and os.path.isdir(path):
            turns.append(1)
            if len(turns) == turn:
                die()
        rmtree(path, *args, **named)

    shutil.rmtree = broken


def main() -> int:
    plan = json.loads(sys.argv.pop(1))
    from hvdtrain import __main__
    from hvdtrain.checkpoint import writer
    from hvdtrain.comm.world import detect_world

    if detect_world().rank == plan["rank"]:
        when, _, what = plan["place"].partition(" ")
        if when == "in":
            _dying_in_dropping(plan["turn"])
        else:
            name = _FUNCTIONS[what]
            setattr(writer, name, _dying_in(getattr(writer, name), when, plan["turn"]))
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
