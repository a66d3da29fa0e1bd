"""Which nodes are bad: from what they saw, by exact values; then the command, alone and on two ranks."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import TRACE, Prepared, launch, launch_rows

from hvdtrain.data.shards import read_manifest
from hvdtrain.errors import ConfigError
from hvdtrain.jobs.preflight import node, slow_factor_of
from hvdtrain.jobs.preflight.clock import ahead, look_at_clocks
from hvdtrain.jobs.preflight.findings import Finding, Look, judge, resubmit_without, slow, table
from hvdtrain.jobs.preflight.latency import rounds
from hvdtrain.jobs.preflight.node import (
    Gpu,
    Gpus,
    look_at_disk,
    look_at_gpus,
    look_at_staging,
    parse_nvidia_smi,
    safely,
)
from hvdtrain.jobs.preflight.shared_folder import judge_views
from hvdtrain.jobs.preflight.speed import judge_speeds

# --- judging -----------------------------------------------------------------------------------------------------


def _agree(**of_node: str) -> dict[str, list[Look]]:
    return {name: [Look("environment", "", must_agree={"torch": version})] for name, version in of_node.items()}


def test_the_node_that_differs_from_most_is_bad():
    verdict = judge(_agree(n1="A", n2="B", n3="B", n4="B"))
    assert (verdict.bad_nodes, verdict.exit_code) == (("n1",), 70)
    assert verdict.message == "preflight: bad nodes: n1"
    assert verdict.findings[0].verdict == "BAD: torch A, elsewhere B"
    assert [finding.verdict for finding in verdict.findings[1:]] == ["ok"] * 3


def test_of_two_the_first_is_right():
    assert judge(_agree(n1="A", n2="B")).bad_nodes == ("n2",)
    assert judge(_agree(n1="A", n2="A")).exit_code == 0


def test_a_node_with_a_problem_of_its_own_has_no_say_in_what_is_right():
    looks = _agree(n1="A", n2="B", n3="B")
    looks["n3"] = [Look("environment", "", "broken", must_agree={"torch": "B"})]
    assert judge(looks).bad_nodes == ("n2", "n3")


@pytest.mark.parametrize("nodes", [1, 3])
def test_what_all_have_is_no_nodes_fault(nodes: int):
    looks = {f"n{n}": [Look("shards data", "", "missing", exit_code=65)] for n in range(nodes)}
    verdict = judge(looks)
    assert (verdict.bad_nodes, verdict.exit_code) == ((), 65)
    assert verdict.message == ("preflight: " + "on every node: " * (nodes > 1) + "shards data: missing")
    looks["well"] = [Look("shards data", "9 shards")]
    verdict = judge(looks)
    assert (len(verdict.bad_nodes), verdict.exit_code) == (nodes, 70)


def test_broken_by_themselves_all_may_be_bad():
    verdict = judge({name: [Look("GPUs", "", "ECC")] for name in ("n1", "n2")})
    assert (verdict.bad_nodes, verdict.exit_code) == (("n1", "n2"), 70)


def test_a_note_is_no_reason_to_stay_away():
    verdict = judge({"n1": [Look("/dev/shm", "none", note="slower")]})
    assert (verdict.exit_code, verdict.findings[0].verdict) == (0, "note: slower")


def test_healthy_nodes_share_a_row_where_there_are_many():
    findings = [Finding(f"n{n}", "memory copy", f"{n} GB/s", "ok", n) for n in range(10, 30)]
    findings += [Finding("n9", "memory copy", "1 GB/s", "BAD: slow", 1), Finding("n9", "GPUs", "none", "ok")]
    assert table(findings).splitlines() == [
        "node      check        found                verdict",
        "20 nodes  memory copy  10 GB/s ... 29 GB/s  ok",
        "n9        memory copy  1 GB/s               BAD: slow",
        "n9        GPUs         none                 ok",
    ]


def test_the_words_that_submit_without_the_bad():
    assert resubmit_without(["n2", "n5"]) == ["sbatch", "--exclude=n2,n5"]
    assert resubmit_without(["n2"], "n[7-9]") == ["sbatch", "--exclude=n[7-9],n2"]
    assert resubmit_without([]) == ["sbatch"]


# --- between nodes ------------------------------------------------------------------------------------------------


def test_neighbours_measure_together_and_the_last_of_an_odd_number_afterwards():
    assert rounds([0, 2, 4, 6]) == [[[0, 2], [4, 6]]]
    assert rounds([0, 2, 4]) == [[[0, 2]], [[2, 4]]]
    assert rounds([0]) == []


# --- clocks ------------------------------------------------------------------------------------------------------


@given(
    st.floats(-1e4, 1e4),
    st.lists(st.tuples(*[st.floats(0, 5)] * 4), min_size=1, max_size=5),
)
def test_the_true_skew_is_always_within_the_bounds(skew_s: float, delays: list[tuple[float, ...]]):
    """However late a rank comes to a barrier, or leaves it."""
    mine, others = [], []
    for number, (late_a, late_b, leave_a, leave_b) in enumerate(delays):
        begins = 100.0 * number
        opens = begins + max(late_a, late_b)
        mine.append((begins + late_a + skew_s, opens + leave_a + skew_s))
        others.append((begins + late_b, opens + leave_b))
    found, unsure = ahead(mine, others)
    assert abs(found - skew_s) <= unsure + 1e-6
    looks = look_at_clocks([others, mine], max_skew_s=abs(skew_s) + 1e-3)
    assert [look.problem for look in looks] == ["", ""]


def test_the_quickest_barriers_tell_most():
    mine = [(0.0, 5.0), (10.0, 10.2), (20.0, 28.0)]
    others = [(4.0, 4.5), (9.0, 10.3), (20.0, 20.1)]
    assert ahead(mine, others) == pytest.approx((0.45, 0.55))  # the last two rounds: from -0.1 to 1.0


def test_a_clock_that_is_wrong_for_certain():
    rounds = [[(skew_s + 0.0, skew_s + 0.01)] for skew_s in (-7.0, 0.0, 0.001, 0.3)]
    looks = look_at_clocks(rounds, max_skew_s=1.0)
    assert [bool(look.problem) for look in looks] == [True, False, False, False]  # although the wrong one is first
    assert looks[0].found == "-7.00 s"
    assert looks[0].problem == "more than 1 s from the others"
    two = look_at_clocks(rounds[:2], max_skew_s=1.0)
    assert [bool(look.problem) for look in two] == [False, True]  # of two the first is right


# --- speeds ------------------------------------------------------------------------------------------------------


def test_slower_than_half_the_median():
    assert slow([10.0, 10.0, 10.0, 4.9, 5.1], 2) == [3]
    assert slow([10.0, 3.0], 2) == [1]  # the median of two is 6.5
    assert slow([30.0, 10.0, 9.0, 8.0], 2) == []  # one that is very fast makes none slow
    assert slow([7.0], 2) == []


def test_a_node_is_as_fast_as_its_slowest_rank():
    speeds = [{"memory copy": speed} for speed in (10.0, 3.0, 11.0, 12.0)]
    looks = judge_speeds(["n1", "n1", "n2", "n2"], speeds, factor=2)
    assert looks["n1"][0].found == "3 GB/s"
    assert looks["n1"][0].problem == "rank 1 is slower than the ranks' median by more than 2 times"
    assert (looks["n2"][0].found, looks["n2"][0].problem) == ("11 GB/s", "")


# --- the run folder ----------------------------------------------------------------------------------------------


def _views(*groups: str) -> dict[str, Look]:
    names = [name for names in groups for name in names]
    views = {name: frozenset(group) for group in groups for name in group}
    return judge_views(Path("run"), dict.fromkeys(names, ""), views)


@pytest.mark.parametrize(
    ("groups", "bad", "exit_code"),
    [
        (("abcd",), (), 0),
        (("ab", "cde"), ("a", "b"), 70),
        (("a", "b"), ("b",), 70),
        (("a", "b", "c"), (), 74),  # nobody shares it with anybody
    ],
)
def test_who_does_not_see_the_others_files(groups: tuple[str, ...], bad: tuple[str, ...], exit_code: int):
    verdict = judge({name: [look] for name, look in _views(*groups).items()})
    assert (verdict.bad_nodes, verdict.exit_code) == (bad, exit_code)


def test_a_node_that_cannot_write_is_bad_and_the_others_do_not_wait_for_its_file():
    problems = {"a": "", "b": "Read-only file system", "c": ""}
    looks = judge_views(Path("run"), problems, dict.fromkeys("ac", frozenset("ac")))
    assert {name: look.problem for name, look in looks.items()} == problems


# --- one node ----------------------------------------------------------------------------------------------------


def test_what_nvidia_smi_says():
    text = "GPU-aa-1, 41, 0\nGPU-bb-2, 93, [N/A]\nGPU-cc-3, [N/A], 7\n"
    assert parse_nvidia_smi(text) == {"aa-1": Gpu(41, 0), "bb-2": Gpu(93, None), "cc-3": Gpu(None, 7)}
    assert parse_nvidia_smi("No devices were found\n") == {}
    with pytest.raises(ValueError, match="nvidia-smi answers 'strange'"):
        parse_nvidia_smi("strange\n")


@pytest.mark.parametrize(
    ("gpu", "ranks", "problem", "exit_code"),
    [
        (Gpu(40, 0), 2, "", 70),
        (Gpu(40, 0), None, "", 70),
        (Gpu(95, 0), 2, "95 °C, before any work", 70),
        (Gpu(40, 3), 2, "uncorrected memory errors (ECC) in GPU-a, GPU-b", 70),
        (Gpu(40, 0), 4, "2 GPUs for 4 ranks: start one rank per GPU", 2),
    ],
)
def test_gpus(gpu: Gpu, ranks: int | None, problem: str, exit_code: int):
    # Two ranks that see their own only, as with srun --gpus-per-task.
    seen = [Gpus((name,), {name: gpu}) for name in "ab"]
    look = look_at_gpus(seen, ranks)
    assert (look.problem, look.exit_code, look.must_agree) == (problem, exit_code, {"GPUs": "2"})


def test_gpus_that_are_not_there_or_do_not_answer():
    assert look_at_gpus([Gpus(), Gpus()], 2) == Look("GPUs", "none", must_agree={"GPUs": "none"})
    assert look_at_gpus([Gpus((), {"a": Gpu(40, 0)})], None).problem == "nvidia-smi shows 1 GPU, torch none"
    assert look_at_gpus([Gpus((), None, "no answer")], None).problem == "no answer"
    assert look_at_gpus([Gpus(tuple("abcd"))], 2).note == "2 ranks: the other GPUs will have nothing to do"


def test_nvidia_smi_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nexec sleep 100\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(node, "LIMIT_S", 0.6)
    assert node.see_gpus().driver_problem == "nvidia-smi has not answered within 0.3 s"


def test_a_disk_without_room(tmp_path: Path):
    look = look_at_disk("disk", tmp_path / "not" / "yet", least_bytes=1 << 60, exit_code=74)
    assert f"free in {tmp_path}, " in look.problem
    assert (look.problem.endswith(" are needed"), look.exit_code) == (True, 74)
    assert look_at_disk("disk", tmp_path, least_bytes=1).problem == ""


def test_staging_needs_room_for_what_is_not_there(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(node, "look_at_disk", lambda check, path, least, code: asked.append(least))
    manifest = read_manifest(prepared.shards)
    look_at_staging(tmp_path, [prepared.shards])
    first, *rest = manifest.shards
    (tmp_path / manifest.data_digest).mkdir()
    (tmp_path / manifest.data_digest / first.file).write_bytes(bytes(first.file_bytes))
    look_at_staging(tmp_path, [prepared.shards])
    assert asked == [sum(info.file_bytes for info in manifest.shards), sum(info.file_bytes for info in rest)]


def test_a_look_that_hangs_is_a_problem():
    """A dead file system: the rank goes on, and its node is named."""
    hung = threading.Event()
    began = time.monotonic()
    look = safely("shards", lambda: hung.wait(60), limit_s=0.1)
    hung.set()
    assert (look.problem, time.monotonic() - began < 30) == ("no answer within 0.1 s", True)


@pytest.mark.parametrize(("env", "factor"), [({}, 2.0), ({"HVDTRAIN_SLOW_FACTOR": "3.5"}, 3.5)])
def test_the_factor_of_a_site(env: dict[str, str], factor: float):
    assert slow_factor_of(env) == factor
    with pytest.raises(ConfigError, match="HVDTRAIN_SLOW_FACTOR='two' is no number"):
        slow_factor_of({"HVDTRAIN_SLOW_FACTOR": "two"})


# --- the command -------------------------------------------------------------------------------------------------


def test_one_process(prepared: Prepared, tmp_path: Path):
    (tmp_path / "file").touch()
    job = ("doctor", "--job")
    rows = [
        (*job, "--data", prepared.shards, "--stage", tmp_path, "--run-dir", tmp_path / "run", "--json", tmp_path / "j"),
        (*job, "--data", prepared.shards, tmp_path / "nowhere", "--run-dir", tmp_path / "run"),
        (*job, "--run-dir", tmp_path / "file" / "run"),
        (*job, "--json", tmp_path / "nowhere" / "j"),
        (*job, "--max-clock-skew", "0"),
        (*job, "--max-clock-skew", "soon"),
        (*job, "--slow-factor", "1"),
        (*job, "--stage", tmp_path),
        ("doctor", "--run-dir", tmp_path),
    ]
    done = launch_rows(rows, env={"HVDTRAIN_EXCLUDED": "n7"})
    assert [row.exit_code for row in done] == [0, 65, 74, 74, 2, 2, 2, 2, 2], done
    assert TRACE not in "".join(row.text for row in done)
    assert [len(row.messages) for row in done] == [0] + [1] * 8
    assert done[0].stdout.splitlines()[-1].startswith("hvdtrain: preflight: 1 node healthy (")
    assert {"staging", "run folder", "/dev/shm", "matrix product"} <= {
        found["check"] for found in json.loads((tmp_path / "j").read_text())["findings"]
    }
    assert list((tmp_path / "run").iterdir()) == []
    assert f"preflight: shards {tmp_path}/nowhere: no shards in {tmp_path}/nowhere" in done[1].messages[0]
    assert "preflight: run folder: Not a directory" in done[2].messages[0]
    assert "--stage needs --data" in done[7].messages[0]
    assert "--run-dir goes with --job" in done[8].messages[0]


def test_a_bad_node_is_named(prepared: Prepared, tmp_path: Path):
    """Two ranks that stand for two nodes, each in a folder of its own; the second has no shards there."""
    for name in ("n0", "n1"):
        (tmp_path / name).mkdir()
    (tmp_path / "n0" / "shards").symlink_to(prepared.shards)
    script = (
        'export SLURMD_NODENAME=n$OMPI_COMM_WORLD_RANK; cd "$0/$SLURMD_NODENAME" || exit 1; '
        'exec "$@" --data shards --slow-factor 50'
    )
    words = (sys.executable, "-m", "hvdtrain", "doctor", "--job", "--json", tmp_path / "found.json")
    env = {"HVDTRAIN_EXCLUDED": "n7", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = launch(*words, program=("bash", "-c", script, tmp_path), how="mpirun", ranks=2, env=env)
    assert (done.exit_code, TRACE in done.text) == (70, False), done
    assert done.messages == ["hvdtrain: preflight: bad nodes: n1"]
    (row,) = [line for line in done.stdout.splitlines() if "BAD: " in line]
    assert (row.split()[0], "BAD: no shards in shards" in row) == ("n1", True), done
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["bad_nodes"], found["resubmit"]) == (["n1"], ["sbatch", "--exclude=n7,n1"])
