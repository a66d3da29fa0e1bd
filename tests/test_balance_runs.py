"""A rank that computes slowly, from the command line down: fewer rows, the same data, and resumed."""

import json
import sys
from pathlib import Path

from launch import Prepared, succeed, summary

# Rank 1 takes twice as long for a row as rank 0. Sleeping, so that it does so on a busy machine too.
SLOW = """
import sys, time
from hvdtrain import __main__
from hvdtrain.comm.world import detect_world
from hvdtrain.cut.whole import Whole

compute, of_a_row = Whole.forward_backward, 0.02 * (1 + detect_world().rank)

def slow(self, microbatches, *rest):
    time.sleep(of_a_row * sum(len(batch.tokens) for batch in microbatches))
    return compute(self, microbatches, *rest)

Whole.forward_backward = slow
sys.exit(__main__.main())
"""


def test_a_slow_rank_gets_fewer_rows_and_the_run_goes_on(prepared: Prepared, trained: Path, tmp_path: Path):
    """Saved at 6; what is resumed begins with equal shares, and finds its own. One process's data and scores."""
    run, expected = tmp_path / "run", summary(trained)
    words = ("train", prepared.recipe, "balance.every=3", "--run-dir", run)
    slow = {"how": "mpirun", "ranks": 2, "program": (sys.executable, "-c", SLOW)}
    assert_balanced(succeed(*words, "train.steps=6", **slow).text, run)
    said = succeed(*words, **slow).text
    assert "resumed from" in said
    found = assert_balanced(said, run)
    assert (found["sample_digest"], found["tokens"]) == (expected["sample_digest"], expected["tokens"])
    assert abs(found["val_loss"] - expected["val_loss"]) < 1e-4  # fp32 sums in another order
    assert expected["balance"] is None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "most_rows" not in lines[0]
    (end,) = [line for line in lines if line["kind"] == "train" and line["step"] == 12]
    assert end["most_rows"] > 6 > end["fewest_rows"]
    assert end["imbalance"] >= 1


def assert_balanced(said: str, run: Path) -> dict:
    """The run's summary."""
    assert "from now on ranks take " in said
    found = summary(run)
    many, few = found["balance"]["rows"]
    assert many > few and many + few == 12
    assert found["balance"]["share_changes"] >= 1
    return found
