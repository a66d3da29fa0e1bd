"""``start_timeline``: a file that a browser can open, with the names of what was sent."""

import json
import sys
from pathlib import Path

import pytest
from launch import launch

from hvdtrain.comm.horovod_group import KNOBS, set_knobs
from hvdtrain.comm.local_group import LocalGroup

_RUN = """
import sys
from pathlib import Path
import torch
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import detect_world
from hvdtrain.sync.wire import make_wire
with open_group(detect_world(), timeline=True) as group:
    torch.ones(1)
    group.all_reduce_sum(torch.ones(5), "before")
    notes = group.start_timeline(Path(sys.argv[1]))
    for step in range(20):
        make_wire("fp32", group).start(torch.ones(1000), "hvdtrain.gradients.0").wait()
        make_wire("bf16", group).start(torch.ones(1000), "hvdtrain.gradients.1").wait()
    if sys.argv[2] == "stop":
        group.stop_timeline()
        group.stop_timeline()
        group.barrier()  # or rank 0 hears of the next while it still records
        group.all_reduce_sum(torch.ones(5), "after")
    if group.rank == 0:
        print(*notes, sep="\\n")
"""


@pytest.mark.parametrize(("how", "end"), [("mpirun", "stop"), ("mpirun", "close"), ("gloo", "close")])
def test_it_holds_what_was_sent(tmp_path: Path, how: str, end: str):
    path = tmp_path / "new" / "timeline.json"
    done = launch(path, end, how=how, ranks=2, program=(sys.executable, "-c", _RUN))
    assert done.exit_code == 0, done
    assert f"timeline in {path}" in done.text
    events = json.loads(path.read_text())
    names = {event["args"].get("name") for event in events if event.get("name") == "process_name"}
    sent = {
        f"all{kind}.hvdtrain.gradients.{what}"
        for kind, what in [("reduce", 0), ("toall", "1.parts"), ("gather", "1.sums")]
    }
    assert sent <= names
    assert not [name for name in names if name and name.endswith(("before", "after"))]
    begun = sum(event["ph"] == "B" and "ALLREDUCE" in event["name"] for event in events)
    assert begun >= 20  # every step's


def test_a_place_that_cannot_be_written_is_one_message(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = launch(tmp_path / "file" / "x.json", "stop", how="mpirun", ranks=2, program=(sys.executable, "-c", _RUN))
    assert done.exit_code != 0
    assert [line.partition("timeline")[0] for line in done.messages] == ["hvdtrain: OutputError: cannot write the "]


def test_one_process_has_none(tmp_path: Path):
    group = LocalGroup()
    notes = group.start_timeline(tmp_path / "t.json")
    group.stop_timeline()
    assert len(notes) == 1
    assert "one process sends nothing" in notes[0]
    assert not (tmp_path / "t.json").exists()


def test_the_users_knobs_win():
    environment = {"HOROVOD_FUSION_THRESHOLD": "1024"}
    set_knobs(environment)
    assert environment == {**KNOBS, "HOROVOD_FUSION_THRESHOLD": "1024"}
    assert all(value.replace(".", "").isdigit() for value in KNOBS.values())


@pytest.mark.parametrize(
    ("topology", "variable"), [("torus", "HOROVOD_TORUS_ALLREDUCE"), ("hierarchical", "HOROVOD_HIERARCHICAL_ALLREDUCE")]
)
def test_horovod_is_told_its_topology(topology: str, variable: str):
    environment: dict[str, str] = {}
    set_knobs(environment, topology)
    assert environment == {**KNOBS, variable: "1"}
    set_knobs(flat := {}, "flat")
    assert flat == KNOBS
