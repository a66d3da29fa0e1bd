"""Exit codes, and who says what went wrong."""

import pytest

from hvdtrain import __main__, cli, errors
from hvdtrain.errors import EXIT_CRASH, EXIT_OK, ConfigError, DataError, plural, report


def test_exit_codes_are_what_batch_scripts_read():
    """Slurm templates name these numbers; so does the README."""
    names = [name for name in dir(errors) if name.endswith("Error") and name != "RankError"]  # which takes another's
    codes = {name: getattr(errors, name).exit_code for name in names}
    assert codes == {
        "HvdtrainError": 70,
        "ConfigError": 2,
        "LaunchError": 2,
        "DataError": 65,
        "CheckpointError": 65,
        "OutputError": 74,
        "DivergedError": 76,
        "RankLostError": 70,
        "WithoutOthersError": 75,
        "ReplicaError": 70,
        "MemoryLimitError": 71,
    }
    assert (EXIT_OK, errors.EXIT_STOPPED_EARLY) == (0, 75)


def test_an_error_is_reported_once_by_rank_0(capsys: pytest.CaptureFixture[str]):
    error = DataError("no shards in x")
    report(error, is_main=True)
    report(error, is_main=True)
    report(DataError("other"), is_main=False)
    assert capsys.readouterr().err == "hvdtrain: DataError: no shards in x\n"


def end_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def fail(*_args) -> int:
        raise error

    for mark in ("OMPI_COMM_WORLD_SIZE", "HOROVOD_RANK", "SLURM_STEP_ID", "PMI_SIZE"):
        monkeypatch.delenv(mark, raising=False)
    monkeypatch.setattr(cli, "run", fail)
    return __main__.main(["doctor"])


def test_an_error_for_the_user_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert end_with(monkeypatch, ConfigError("no such key")) == 2
    assert capsys.readouterr().err == "hvdtrain: ConfigError: no such key\n"


def test_a_crash_is_70_with_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Not Python's own 1: a batch script must tell our mistake from the user's."""
    assert end_with(monkeypatch, ZeroDivisionError("oops")) == EXIT_CRASH
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    assert end_with(monkeypatch, KeyboardInterrupt()) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_a_closed_pipe_is_not_success(monkeypatch: pytest.MonkeyPatch):
    """`train demo | head` ends the training long before its last step: 0 would say that it is finished."""
    assert end_with(monkeypatch, BrokenPipeError()) != EXIT_OK


def test_a_number_and_its_noun():
    assert [plural(number, "rank") for number in (0, 1, 2, 4096)] == ["0 ranks", "1 rank", "2 ranks", "4096 ranks"]
    assert plural(4096, "rank", ",") == "4,096 ranks"
