"""A rank that goes on, but not like the others: slower, or with other weights."""

import re
import socket
from pathlib import Path

from breaking import program
from launch import TRACE, Prepared, launch

# From its first step on one weight is not what the others have, and every step's batch takes half a second.
_ODD = (
    "import gc, hvdtrain.data.loader as loader; gc.unfreeze(); "
    "engine = next(one for one in gc.get_objects() if type(one).__name__ == 'Engine'); "
    "engine.replica.slices[3].tensor.data.view(-1)[:1].add_(1e-3); "
    "read = loader.TrainLoader.next_step; "
    "loader.TrainLoader.next_step = lambda self: (time.sleep(0.5), read(self))[1]"
)


def test_it_is_named_and_its_weights_are_not_saved(prepared: Prepared, tmp_path: Path):
    options = ("watchdog.stragglers_every=2", "metrics.every=1")
    words = ("train", prepared.recipe, "--run-dir", "run", *options)
    done = launch(*words, program=program(_ODD, "first step"), how="mpirun", ranks=2, cwd=tmp_path)
    host = socket.gethostname()
    (slow,) = [line for line in done.stdout.splitlines() if " is slow: " in line]
    assert slow.startswith(f"hvdtrain: note: rank 1 on {host} is slow: its own part of a step takes "), done
    assert (done.exit_code, len(done.messages), TRACE in done.text) == (70, 1, False), done
    assert re.match(
        rf"hvdtrain: ReplicaError: step 6: the replicas of rank 0 on {host} and rank 1 on {host} differ, and no "
        r"majority tells which is right; first in \S+ \(\d+ of \d+ tensors\); the last checkpoint is from before",
        done.messages[0],
    ), done
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
