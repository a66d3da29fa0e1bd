"""The watchdog: who is called idle, who is behind, what is written, and when it stays silent."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from command import until
from threads import Scripted

import hvdtrain.comm.horovod_group
from hvdtrain.watch import watchdog
from hvdtrain.watch.watchdog import Heartbeat, Idle, Watchdog, WatchdogOptions, look_at, read_heartbeat, who_is_behind

LIMIT_S = 0.3
_PATIENCE_S = watchdog.patience_s  # before any test replaces it


@pytest.fixture(autouse=True)
def _no_last_resort(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The alarm's last means is os._exit, seconds later; and the patience with other ranks is long."""
    monkeypatch.setattr(watchdog, "_end_process_after", lambda seconds: None)
    monkeypatch.setattr(watchdog, "patience_s", lambda rank: 0.1 * rank)
    yield
    assert "hvdtrain-watchdog" not in [thread.name for thread in threading.enumerate()]


def _options(timeout_s: float = LIMIT_S) -> WatchdogOptions:
    return WatchdogOptions(timeout_s=timeout_s, start_timeout_s=60)


def _beat(rank: int, step: int, phase: str, waits: bool, age_s: float = 0.0) -> Heartbeat:
    return Heartbeat(rank, f"node{rank}", 7, step, phase, 1000.0 - age_s, 2.0, waits, "")


@pytest.mark.parametrize(
    ("beats", "behind"),
    [
        ([_beat(0, 5, "sync", True), _beat(1, 5, "data", False), _beat(2, 5, "sync", True)], [1]),
        ([_beat(0, 5, "sync", True), _beat(1, 5, "compute", False), _beat(2, 4, "checkpoint", False)], [2]),
        ([_beat(0, 5, "sync", True), _beat(1, 9, "data", False, age_s=11), None], [1, 2]),
        ([_beat(0, 5, "checkpoint", True), _beat(1, 5, "evaluation", True), _beat(2, 6, "sync", True)], [1]),
        ([_beat(0, 6, "checkpoint", True), _beat(1, 6, "checkpoint", False)], [1]),
        ([_beat(0, 5, "sync", True), _beat(1, 5, "sync", True)], [0, 1]),
    ],
)
def test_who_is_behind(beats: list[Heartbeat | None], behind: list[int]):
    found = who_is_behind(beats, now=1000.0, silent_s=10.0)
    assert found == [(rank, beats[rank]) for rank in behind]


def test_a_suspended_process_was_not_idle():
    idle, place = Idle(("data", 1), period_s=5), ("compute", 1)
    now = time.monotonic()
    assert idle.look(place, now + 5) == 0
    assert idle.look(place, now + 10) == 5
    assert idle.look(place, now + 90_000) == 20  # 15 of it
    assert idle.look(place, now + 90_005) == 25
    assert idle.look((*place,), now + 90_010) == 0  # equal, but entered again


def test_a_rank_in_a_collective_waits():
    """Told by the stack alone, however Horovod and MPI are called."""
    namespace: dict[str, Callable] = {}
    source = "def wait(inside):\n    return inside()\n"
    exec(compile(source, hvdtrain.comm.horovod_group.__file__, "exec"), namespace)
    exec(
        compile(source.replace("wait", "finish"), str(Path(watchdog.__file__).parents[1] / "train.py"), "exec"),
        namespace,
    )

    def here() -> tuple[bool, str]:
        frame: FrameType = sys._getframe()
        return look_at(frame)

    wait, finish = namespace["wait"], namespace["finish"]
    assert finish(lambda: wait(here)) == (True, "finish (train.py:2)")
    assert wait(lambda: finish(here)) == (False, "finish (train.py:2)")
    assert wait(here) == (True, "")
    assert look_at(None) == (False, "")


def test_a_hang_is_told_and_ends_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    group = Scripted()
    with pytest.raises(KeyError), Watchdog(_options(), tmp_path, group) as watched:
        watched.enter("compute", 4)
        watched.enter("data", 5)
        until(lambda: group.did != [], "the alarm", 20)
        raise KeyError  # as if the hang had ended with an error
    assert set(group.did) == {70}
    stacks = (tmp_path / "heartbeats/rank-00000.stacks.txt").read_text()
    assert re.match(r"no progress for \d s in data of step 5\n", stacks)
    assert "in test_a_hang_is_told_and_ends_the_job" in stacks
    found = read_heartbeat(tmp_path / "heartbeats/rank-00000.json")
    assert (found.rank, found.step, found.phase, found.waits) == (0, 5, "data", False)
    err = capfd.readouterr().err
    assert re.search(
        rf"hvdtrain: \[rank 0 on {found.host}\] no progress for \d s in data of step 5; stacks: {tmp_path}", err
    )
    assert "in test_a_hang_is_told_and_ends_the_job" in err


def test_who_waits_names_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "look_at", lambda frame: (True, "finish (allreduce.py:9)"))
    (tmp_path / "heartbeats").mkdir()
    culprit = vars(_beat(0, 5, "data", False)) | {"time": time.time() + 3600}
    (tmp_path / "heartbeats/rank-00000.json").write_text(json.dumps(culprit))
    group = Scripted(rank=1, size=2)
    with Watchdog(_options(), tmp_path, group) as watched:
        watched.enter("compute", 4)
        watched.enter("sync", 5)
        until(lambda: group.did != [], "the alarm", 20)
    assert "in sync of step 5, finish (allreduce.py:9); behind: rank 0 on node0 (process 7) in data of step 5" in (
        capfd.readouterr().err
    )


class Silent:
    """Of a node that does not answer: it says so for as long as it is asked without a word of progress."""

    looks = 0

    def look(self, now: float) -> dict[str, float]:
        self.looks += 1
        return {"n2 (10.0.0.2)": 0.2 * self.looks}

    def forget(self) -> None:
        self.looks = 0


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Silent:
    silent = Silent()
    monkeypatch.setattr(watchdog, "Silence", lambda hosts: silent)
    return silent


def test_a_silent_node_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], silent: Silent):
    """But not for what it did between steps that were made after all."""
    group = Scripted(rank=0, size=2)
    options = WatchdogOptions(timeout_s=60, start_timeout_s=60, network_timeout_s=1)  # a look every 0.1 s
    with Watchdog(options, tmp_path, group) as watched:
        for step in (1, 2, 3, 4):
            watched.enter("sync", step)
            until(lambda: silent.looks == 0, "it is forgotten", 20)
            until(lambda: silent.looks > 1, "two looks", 20)
        assert group.did == []
        watched.enter("sync", 5)
        until(lambda: group.did != [], "the end of the job", 20)
    assert set(group.did) == {70}
    said = capfd.readouterr().err.splitlines()[0]
    assert "no answer from n2 (10.0.0.2) for 1 s, in sync of step 5" in said
    assert said.endswith(": the network to it or the node itself is gone")


def test_tcp_alone_may_judge_silence(tmp_path: Path, silent: Silent):
    with Watchdog(WatchdogOptions(timeout_s=3, network_timeout_s=0), tmp_path, Scripted()) as watched:  # every 0.3 s
        watched.enter("sync", 1)
        time.sleep(1.5)
        assert silent.looks == 0


def test_progress_keeps_it_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Steps, batches of an evaluation, and a start that may take its time."""
    group = Scripted()
    with Watchdog(_options(), tmp_path, group) as watched:
        time.sleep(3 * LIMIT_S)  # reading, compiling
        watched.enter("compute", 1)
        time.sleep(3 * LIMIT_S)  # the first step
        watched.enter("evaluation", 2)
        for _ in watched.each(range(15)):
            time.sleep(0.2 * LIMIT_S)
        assert read_heartbeat(tmp_path / "heartbeats/rank-00000.json") is not None
    assert group.did == []
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []  # nothing is left of a run that ended well


@pytest.mark.parametrize("timeout_s", [0, 60])
def test_no_files_without_need(tmp_path: Path, timeout_s: float):
    """It is off; or the run folder is not there, and is not the watchdog's to make."""
    with Watchdog(_options(timeout_s), tmp_path / "run", Scripted()) as watched:
        assert ("hvdtrain-watchdog" in [thread.name for thread in threading.enumerate()]) == (timeout_s > 0)
        watched.enter("data", 1)
        watched._beat(("data", 1), 0.0, 0.0)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_start_that_was_killed_go_with_the_end(tmp_path: Path):
    """The end may come before the first beat. Stacks of a hang stay."""
    (tmp_path / "heartbeats").mkdir()
    for rank in (0, 1):
        (tmp_path / f"heartbeats/rank-{rank:05d}.json").touch()
        (tmp_path / f"heartbeats/rank-{rank:05d}.stacks.txt").write_text("in finish" * rank)
    for rank in (0, 1):
        with Watchdog(_options(60), tmp_path, Scripted(rank=rank, size=2)):
            pass
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["rank-00001.stacks.txt"]


def test_what_cannot_be_written_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "heartbeats").write_text("no folder")
    group = Scripted()
    with Watchdog(_options(), tmp_path, group) as watched:
        watched.enter("compute", 4)
        watched.enter("data", 5)
        until(lambda: group.did != [], "the alarm", 20)
    lines = capfd.readouterr().err.splitlines()
    assert len([line for line in lines if f"note: cannot write {tmp_path}/heartbeats: File exists" in line]) == 1
    assert [line for line in lines if re.search(r"no progress for \d s in data of step 5; stacks: above$", line)]


def test_a_half_written_heartbeat_is_none(tmp_path: Path):
    path = tmp_path / "rank-00000.json"
    for text in ("", "{", "[1]", '{"rank": 1}', json.dumps({**vars(_beat(0, 1, "data", False)), "more": 1})):
        path.write_text(text)
        assert read_heartbeat(path) is None
    path.write_text(json.dumps(vars(_beat(0, 1, "data", False))).ljust(511) + "\n")
    assert read_heartbeat(path) == _beat(0, 1, "data", False)
    path.unlink()
    assert read_heartbeat(path) is None


def test_few_ranks_speak():
    """The culprit has some seconds, then rank 0, rank 1, and the others when both are silent."""
    waits = [_PATIENCE_S(rank) for rank in (0, 1, 2, 3, 4095)]
    assert waits[0] >= 3
    assert waits[1] - waits[0] >= 1 <= waits[2] - waits[1]
    assert waits == sorted(waits)
    assert waits[-1] < 60
