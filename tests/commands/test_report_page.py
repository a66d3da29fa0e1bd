"""``hvdtrain report --html``: what stands on the page, of runs as they leave it, stopped and killed ones among them."""

import json
from pathlib import Path

import pytest
from browser import open_page
from measured_runs import write_measured_run

from hvdtrain import cli
from hvdtrain.comm.world import World
from hvdtrain.config import load_config
from hvdtrain.errors import CheckpointError


def add_job(run: Path, name: str, started: str, **said: object) -> None:
    (run / "jobs" / name).mkdir()
    job = json.loads((run / "jobs" / "1-0" / "job.json").read_text())
    (run / "jobs" / name / "job.json").write_text(json.dumps({**job, "started": started, **said}))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """One that a limit stopped, that was killed, and that then skipped two steps; one with another width."""
    settings = [["model.width=32", "model.heads=2"], ["model.width=64", "model.heads=2"]]
    folders = [tmp_path / "narrow", tmp_path / "wide"]
    for number, (folder, words) in enumerate(zip(folders, settings, strict=True)):
        said = {"reason": "time limit", "exit_code": 75, "ended": "2026-01-01T01:00:00+00:00", "step_ended": 20}
        write_measured_run(folder, load_config("demo", words), 1, 2, 0.5 + number, 5 - 3 * number, **said)
    add_job(folders[0], "2-0", "2026-01-02T00:00:00+00:00", step_began=20, job_id="2", ended="", exit_code=None)
    killed = folders[0] / "jobs" / "2-0" / "job.json"
    killed.write_text(json.dumps({k: v for k, v in json.loads(killed.read_text()).items() if k != "ended"}))
    add_job(folders[0], "3-0", "2026-01-03T00:00:00+00:00", step_began=20, job_id="3", reason="finished", exit_code=0,
            ended="2026-01-03T01:00:00+00:00", step_ended=60)  # fmt: skip
    with (folders[0] / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 60, "loss": 2.0, "tokens": 9, "skipped_steps": 2}\n')
        log.write('{"kind": "eval", "step": 60, "val_loss": 2.5}\n')
    return folders


def page(tmp_path: Path, runs: list[Path]) -> tuple[Path, str]:
    words = cli._parse(["report", *map(str, runs), "--html", "--out", str(tmp_path / "all.html")])
    assert words.run(words, World()) == 0
    return tmp_path / "all.html", (tmp_path / "all.md").read_text()


def test_what_happened_to_a_run(tmp_path: Path, runs: list[Path]):
    text = page(tmp_path, runs)[1]
    events = [line for line in text.split("## Events")[1].split("##")[0].splitlines() if line.startswith("| narrow")]
    said = [event.split(" | ")[-1].rstrip(" |") for event in events]
    assert said == [
        "a job began, 2 ranks on 1 node",
        "a job ended: time limit (exit code 75)",
        "job 2 went on, 2 ranks on 1 node",
        "job 2 ended without a word",
        "job 3 went on, 2 ranks on 1 node",
        "job 3 ended: finished (exit code 0)",
        "2 skipped by the guard until here",
    ]


def test_only_settings_that_differ_are_shown(tmp_path: Path, runs: list[Path]):
    text = page(tmp_path, runs)[1].split("## Settings that differ")[1].split("##")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == ["| setting | narrow | wide |", "| --- | --- | --- |", "| model.width | 32 | 64 |"]
    assert "Settings that differ" not in page(tmp_path, runs[:1])[1]


def test_times_by_part_are_medians_without_the_start_up(tmp_path: Path, runs: list[Path]):
    text = page(tmp_path, runs)[1]
    assert "| wide | 0.0000 (0%) | 1.0500 (70%) | 0.3000 (20%) | 0.1500 (10%) | 0.0000 (0%) | 1.5000 | - |" in text


def test_a_browser_opens_the_report(tmp_path: Path, runs: list[Path]):
    shown, asked = open_page(page(tmp_path, runs)[0], tmp_path)
    assert asked == set()
    assert shown.count("data:image/png;base64,") == 2


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        page(tmp_path, [tmp_path])


def test_a_run_without_times_and_jobs(tmp_path: Path):
    """As one that was killed in its first step, or made by hand."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text("")
    text = page(tmp_path, [tmp_path / "bare"])[1]
    assert "None is known of." in text and "Where a step" not in text
