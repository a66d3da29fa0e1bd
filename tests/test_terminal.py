"""On a terminal a person reads plain lines and sees how far a run is, under every launcher; a log stays a log."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import LAUNCHERS, Done, Prepared, environment
from on_terminal import on_terminal

from hvdtrain.comm import terminal
from hvdtrain.comm.world import World
from hvdtrain.watch import bar as bar_module
from hvdtrain.watch.bar import Bar

# In place of a training: what it does at its beginning, and a line on both outputs.
_RANK = """
import sys
from hvdtrain.comm.terminal import take_terminal, write_whole_lines
from hvdtrain.comm.world import detect_world
world = detect_world()
write_whole_lines(world)
taken = take_terminal(world)
sys.stdout.write(f"rank {world.rank} speaks, {taken}\\n")
sys.stderr.write(f"rank {world.rank} complains, {taken}\\n")
"""


@pytest.fixture
def rank(tmp_path: Path) -> str:
    (tmp_path / "rank.py").write_text(_RANK)
    return f"env PYTHONPATH={Path(terminal.__file__).parents[2]} {sys.executable} {tmp_path}/rank.py"


def words(how: str, *more: str) -> str:
    return " ".join([*LAUNCHERS[how], "2", *more])


@pytest.mark.parametrize("how", ["mpirun", "horovodrun", "gloo"])
def test_rank_0_speaks_to_the_terminal_itself(tmp_path: Path, rank: str, how: str):
    """Also where background processes that write are stopped, as mpirun puts its ranks there."""
    found = on_terminal(f"stty tostop; {words(how)} {rank}", tmp_path)
    assert found.exit_code == 0, found
    tags = {
        "mpirun": ("", ""),
        "horovodrun": ("[1,1]<stdout>:", "[1,1]<stderr>:"),
        "gloo": ("[1]<stdout>:", "[1]<stderr>:"),
    }
    of_rank_1 = [f"{tag}rank 1 {says}, False" for tag, says in zip(tags[how], ("speaks", "complains"), strict=True)]
    assert sorted(found.lines) == sorted(["rank 0 speaks, True", "rank 0 complains, True", *of_rank_1]), found


@pytest.mark.parametrize(
    "command",
    [
        "{gloo} {rank} > log; cat log",
        "{gloo} {rank} 2> log; cat log",
        "{mpi} {rank} | cat",
        "set -m; {mpi} {rank} & wait",
        "{mpi} sh -c '{rank} > log.$OMPI_COMM_WORLD_RANK'; cat log.0 log.1",
        "{mpi} sh -c '{rank} | cat'",
        "{mpi} --output-filename logs {rank}",
        "{mpi} --timestamp-output {rank}",
    ],
    ids=[
        "standard output in a file",
        "errors in a file",
        "pipe",
        "background",
        "own file",
        "own pipe",
        "files",
        "times",
    ],
)
def test_what_leads_elsewhere_goes_there(tmp_path: Path, rank: str, command: str):
    """All of it, and nothing twice."""
    found = on_terminal(command.format(mpi=words("mpirun"), gloo=words("gloo"), rank=rank), tmp_path)
    text = "\n".join(found.lines)
    assert found.exit_code == 0, found
    for number in (0, 1):
        for says in ("speaks", "complains"):
            assert text.count(f"rank {number} {says}, False") == 1, found
    assert "True" not in text


def test_a_launcher_gets_whole_lines():
    """Also from a Python that was told to hold nothing back; otherwise a word, a space and the line's end are apart."""
    speaks = (
        "import sys; from hvdtrain.comm.terminal import write_whole_lines; from hvdtrain.comm.world import World\n"
        "write_whole_lines(World(rank=1, size=2, launcher='mpirun'))\n"
        "print('two', 'words'); print('too', 'bad', file=sys.stderr); print('no', 'end', end='')"
    )
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)  # keeps writes apart, as a pipe does not
    with ours, theirs:
        command = (sys.executable, "-c", speaks)
        subprocess.run(
            command, stdout=theirs, stderr=theirs, env={**environment(), "PYTHONUNBUFFERED": "1"}, check=True
        )
        written = [ours.recv(1000) for _ in range(3)]
    assert written == [b"two words\n", b"too bad\n", b"no end"]


def test_lines_in_pieces_are_put_together():
    tags = {"0": "[1,0]<stdout>:", "1": "[1,1]<stdout>:"}
    printed = "mpirun says[0]one [1]un[0]line\n[0][1]e ligne\n[0]\nso much for that\n[1]sans fin"
    for rank, tag in tags.items():
        printed = printed.replace(f"[{rank}]", tag)
    assert Done("horovodrun", 0, printed, "").text.splitlines() == ["one line", "une ligne", "", "sans fin"]


def test_without_a_launcher_nothing_is_led_elsewhere():
    assert not terminal.take_terminal(World())
    assert not terminal.take_terminal(World(rank=1, size=2, launcher="mpirun"))
    assert not terminal.take_terminal(World(rank=0, size=2, launcher="mpirun"))  # pytest is not one of its ranks


def test_preparing_data_does_so_too(prepared: Prepared, tmp_path: Path):
    found = on_terminal(f"{words('horovodrun')} {sys.executable} -m data_prep verify {prepared.shards}", tmp_path)
    assert found.exit_code == 0, found
    assert any(line.startswith(f"{prepared.shards}: whole; ") for line in found.lines), found
    assert not [line for line in found.lines if "<std" in line], found


# --- the bar -------------------------------------------------------------------------------------------------------


def test_a_run_as_people_see_it(prepared: Prepared, tmp_path: Path):
    """The README's line for a workstation: plain lines; a bar with the newest loss, which moves in evaluations too."""
    # Deep, so that an evaluation takes a second or two on any machine: the bar changes ten times a second.
    settings = "train.steps=30 eval.every=15 eval.rows=1 metrics.every=30 checkpoint.every=0 model.layers=24"
    train = f"{sys.executable} -m hvdtrain train {prepared.recipe} {settings} --run-dir run"
    found = on_terminal(f"{words('horovodrun')} {train}", tmp_path)
    assert found.exit_code == 0, found
    assert not [line for line in found.lines if "<std" in line], found
    assert re.match(r"hvdtrain: 2 ranks \(mpirun, ", found.lines[0]), found
    evaluations = [line for line in found.lines if re.match(r"step +\d+/30  val_loss \d\.\d{4}  perplexity", line)]
    assert len(evaluations) == 2, found
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 30]
    last = [line for line in found.lines if line.startswith("100%")]
    assert len(last) == 1, found
    assert f"loss {log[-2]['loss']:.4f}  val loss {log[-1]['val_loss']:.4f}  " in last[0]
    assert "tokens/s" in last[0]
    bars = [state for state in found.states if "step/s" in state]
    losses = {match[1] for bar in bars if (match := re.search(r"/30 .* loss (\d\.\d{4})", bar))}
    assert len(losses) > 2, bars  # not only those of the two logged steps
    percents = {int(match[1]) for bar in bars if (match := re.search(r"15/30 .*evaluating (\d+) %", bar))}
    assert len(percents) > 2, bars
    assert any("saving" in bar for bar in bars)


# With each output in turn led into a file.
_FOR_PEOPLE = """
import os
from hvdtrain.watch.bar import is_for_people
found = [is_for_people()]
for output in (1, 2):
    terminal, file = os.dup(output), os.open("log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, output)
    found.append(is_for_people())
    os.dup2(terminal, output)
print(found)
"""


def test_lines_that_go_into_a_log_have_no_bar(tmp_path: Path):
    """A bar on the terminal once took the lines with it, which the log then lacked."""
    (tmp_path / "look.py").write_text(_FOR_PEOPLE)
    root = Path(terminal.__file__).parents[2]
    found = on_terminal(f"env PYTHONPATH={root} {sys.executable} look.py", tmp_path)
    assert found.lines == ["[True, False, False]"], found


class Device:
    """A GPU as far as a bar sees it: what is copied from it arrives when the test says so."""

    type = "cuda"

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.has_arrived = False
        monkeypatch.setattr(torch.cuda, "Event", lambda: self)
        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **how: zeros(*size, **how))

    def record(self) -> None:
        self.has_arrived = False

    def query(self) -> bool:
        return self.has_arrived


class Loss:
    """A scalar on ``Device``, which nobody may read directly: that would wait."""

    dtype = torch.float64

    def __init__(self, device: Device, value: float):
        self.device, self.value = device, value


def test_no_step_waits_for_its_loss_to_be_shown(monkeypatch: pytest.MonkeyPatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda here, loss, non_blocking: here.fill_(loss.value))
    monkeypatch.setattr(bar_module, "_PERIOD_S", 0.0)
    bar = Bar(10, 0)
    shown = []
    for step, has_arrived in enumerate([False, False, True, False, True], start=1):
        device.has_arrived = has_arrived
        bar.step(Loss(device, float(step)))
        shown.append(bar._parts["loss"])
    bar.close()
    assert shown == ["", "", "loss 1.0000", "loss 1.0000", "loss 3.0000"]
