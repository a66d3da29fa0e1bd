"""How ranks leave: what each says, with which exit code, and that none waits for ever."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
from threads import Scripted

from hvdtrain.comm import session
from hvdtrain.comm.world import World
from hvdtrain.errors import DivergedError, OutputError, RankLostError


class _Ended(BaseException):
    """In place of the end of the process."""


def _one_of_two(rank: int) -> Scripted:
    """Its ``abort`` ends it."""
    group = Scripted(rank, 2)

    def abort(exit_code: int) -> None:
        group.did.append(exit_code)
        raise _Ended

    group.abort = abort  # type: ignore[method-assign]
    return group


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(session, "_LOST_S", 0.01)
    monkeypatch.setattr(session, "LEAVE_S", 0.05)
    yield
    signal.signal(signal.SIGTERM, before)


def _leave(group: Scripted, error: BaseException | None, launcher: str = "srun") -> None:
    with session._in_good_order(group, World(group.rank, 2, 0, 1, launcher)):
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "exit_code", "message", "has_trace"),
    [
        (OutputError("disk full"), 74, "OutputError: disk full", False),
        (IndexError("list index"), 70, "IndexError: list index", True),
        (SystemExit(0), 70, "SystemExit: 0", True),
        (MemoryError(), 71, "out of memory: MemoryError", False),
        (
            RuntimeError("CUDA error: out of memory\nsee above"),
            71,
            "out of memory: RuntimeError: CUDA error: out of m",
            False,
        ),
        (RankLostError("lost contact"), 70, "RankLostError: lost contact", False),
    ],
)
def test_one_that_fails_alone_ends_all(
    capsys: pytest.CaptureFixture[str], error: BaseException, exit_code: int, message: str, has_trace: bool
):
    group = _one_of_two(1)
    with pytest.raises(_Ended):
        _leave(group, error)
    assert group.did == [exit_code]
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith(f"hvdtrain: [rank 1 on {os.uname().nodename}] {message}")
    assert ("Traceback" in err) == has_trace


def test_who_has_lost_another_rank_is_ended_in_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """By the launcher's SIGTERM, although the run had other plans for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ended: list[int] = []

    def end(exit_code: int) -> None:
        ended.append(exit_code)
        raise _Ended

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(session.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM))
    group = _one_of_two(0)
    with pytest.raises(_Ended):
        _leave(group, RankLostError("lost contact"))
    assert (ended, group.did, capsys.readouterr().err) == ([70], [], "")


@pytest.mark.parametrize("rank", [0, 1])
def test_all_that_fail_alike_leave_together(capsys: pytest.CaptureFixture[str], rank: int):
    group = _one_of_two(rank)
    with pytest.raises(DivergedError):
        _leave(group, DivergedError("loss nan"))
    assert group.did == ["barrier", "close"]
    assert capsys.readouterr().err == ("hvdtrain: DivergedError: loss nan\n" if rank == 0 else "")


def test_under_mpirun_rank_0_ends_them(capsys: pytest.CaptureFixture[str]):
    """Once it has spoken and all are there: mpirun would comment on exit codes other than 0."""
    group = _one_of_two(0)
    with pytest.raises(_Ended):
        _leave(group, DivergedError("loss nan"), launcher="mpirun")
    assert group.did == ["barrier", "barrier", 76]
    assert capsys.readouterr().err == "hvdtrain: DivergedError: loss nan\n"


def _lose() -> None:
    raise RankLostError("lost contact")


def test_a_rank_that_is_lost_meanwhile_changes_nothing():
    group = _one_of_two(0)
    group.barrier = _lose  # type: ignore[method-assign]
    with pytest.raises(DivergedError):
        _leave(group, DivergedError("loss nan"))


def test_a_good_end():
    group = _one_of_two(0)
    _leave(group, None)
    assert group.did == ["close"]


def test_nobody_waits_for_ever(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """For a rank that was stopped while all leave."""
    ended, exit_codes = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: (exit_codes.append(code), ended.set()))
    group = _one_of_two(1)
    group.close = lambda: ended.wait(20)  # type: ignore[method-assign]
    _leave(group, None)
    assert exit_codes == [70]
    assert capfd.readouterr().err == f"hvdtrain: [rank 1 on {os.uname().nodename}] not all ranks leave within 0.05 s\n"
