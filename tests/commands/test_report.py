"""The table and the picture of what runs came to, from files as a run leaves them, or a killed one."""

import json
from pathlib import Path

import pytest

from hvdtrain.commands.report import _names, report
from hvdtrain.errors import CheckpointError, OutputError

PNG = b"\x89PNG"


def write_run(
    folder: Path, finished: bool = True, losses=(4.0, 3.0, 2.5), evals=((2, 3.25), (3, 2.75)), **said: str
) -> Path:
    folder.mkdir(parents=True)
    lines = [{"kind": "train", "step": n, "tokens": 1000 * n, "loss": x} for n, x in enumerate(losses, 1)]
    lines += [{"kind": "eval", "step": step, "val_loss": loss} for step, loss in evals]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {"status": "finished", "step": 3, "tokens": 3000, "tokens_per_s": 12345.6}
        summary |= {"world_size": 4, "sample_digest": "ab12", "mfu": 0.4561, **said}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_finished_run(tmp_path: Path):
    run = write_run(tmp_path / "run", evals=((2, 2.5), (3, 2.75)))
    (run / "checkpoints" / "step-00000003").mkdir(parents=True)
    (run / "tensorboard").mkdir()
    lines = report([run], None).splitlines()
    expected = [str(run), "finished", "3", "3,000", "2.7500", "2.5000", "12,346", "45.6%", "4", "ab12", "1,000", "-"]
    assert cells(lines[1]) == expected
    assert len(cells(lines[0])) == len(cells(lines[1]))
    assert (run / "loss.png").read_bytes().startswith(PNG)
    for path in (run / "loss.png", run / "tensorboard", run / "checkpoints" / "step-00000003"):
        assert any(line.endswith(str(path)) for line in lines[2:])


def test_an_unfinished_run_shows_how_far_it_came(tmp_path: Path):
    run = write_run(tmp_path / "run", finished=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert cells(report([run], None).splitlines()[1])[1:6] == ["unfinished", "3", "3,000", "2.7500", "2.7500"]
    assert cells(report([run], None).splitlines()[1])[7] == "-"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('ep\n{"kind": "train", "step": 4, "loss": 2.25, "mfu": 0.305}\n')
    assert cells(report([run], None).splitlines()[1])[2:8:5] == ["4", "30.5%"]


def test_several_runs_share_a_picture(tmp_path: Path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", losses=(), evals=(), finished=False)]
    lines = report(runs, tmp_path / "deep" / "all.png").splitlines()
    assert [cells(line)[0] for line in lines[1:3]] == [str(run) for run in runs]
    assert cells(lines[2])[1:6] == ["unfinished", "0", "0", "-", "-"]
    assert (tmp_path / "deep" / "all.png").read_bytes().startswith(PNG)
    assert not (tmp_path / "a" / "loss.png").exists()


def test_a_summary_that_is_damaged_is_passed_over(tmp_path: Path):
    for number, text in enumerate(["", "{", "[1]", "null"]):
        run = write_run(tmp_path / str(number))
        (run / "summary.json").write_text(text)
        assert "unfinished" in report([run], None)


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"nowhere is not a run folder: cannot read metrics\.jsonl"):
        report([tmp_path / "nowhere"], None)


def test_a_picture_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write .*x\.png"):
        report([write_run(tmp_path / "run")], tmp_path / "file" / "x.png")


def test_the_best_of_several_is_marked(tmp_path: Path):
    ends = (2.75, 2.25, 2.5)
    runs = [write_run(tmp_path / str(n), evals=((2, 2.0), (3, end))) for n, end in enumerate(ends)]
    lines = report(runs, None).splitlines()
    assert [cells(line)[4] for line in lines[1:4]] == ["2.7500", "2.2500 *", "2.5000"]


def test_runs_of_the_same_name_are_told_apart():
    assert _names([Path("runs/a/1"), Path("runs/b/1")]) == ["a/1", "b/1"]
    assert _names([Path("runs/a"), Path("other/b")]) == ["a", "b"]
    assert _names([Path("."), Path()]) == [Path.cwd().name] * 2


def test_the_noise_becomes_a_sentence(tmp_path: Path):
    run = write_run(tmp_path / "run")
    line = {"kind": "train", "step": 4, "tokens": 4000, "loss": 2.4, "noise_scale_tokens": 5000.0}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    assert (
        "batch        run: critical batch about 5,000 tokens; at 1,000 tokens an update the run needs 20 % more "
        "tokens than at a small one; beyond 20 ranks" in report([run], None)
    )


def test_a_run_without_a_noise_scale_says_why(tmp_path: Path):
    run = write_run(tmp_path / "run", noise_scale_note="it takes two replicas")
    assert "batch        run: no noise scale: it takes two replicas" in report([run], None)
