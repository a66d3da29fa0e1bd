"""While libraries are loaded Python seldom looks for circles; in training, as usual, but not among what they loaded."""

import json
import subprocess
import sys

import pytest
from launch import Prepared

PROGRAM = """
import gc, json, sys
from hvdtrain.__main__ import main
usual = gc.get_threshold()
code = main()
print(json.dumps([code, gc.get_threshold() == usual, gc.get_freeze_count()]))
"""


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_what_is_loaded_is_looked_through_no_more(prepared: Prepared, trained, tmp_path, command: str):
    words = {"train": [prepared.recipe, "--run-dir", tmp_path / "run"], "evaluate": [trained]}[command]
    process = [sys.executable, "-c", PROGRAM, command, *map(str, words)]
    done = subprocess.run(process, capture_output=True, text=True, timeout=120)
    code, is_usual, frozen = json.loads(done.stdout.splitlines()[-1])
    assert (code, is_usual) == (0, True), done.stderr
    assert frozen > 100_000


def test_a_command_that_loads_little_stays_as_it_is():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "status", "/nowhere"], capture_output=True, text=True)
    code, is_usual, frozen = json.loads(done.stdout.splitlines()[-1])
    assert (code, is_usual, frozen) == (65, False, 0)
