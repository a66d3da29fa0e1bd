"""``hvdtrain plan`` and time: from runs, from a cluster's figures, of meshes, of the whole run; from the words down."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from measured_runs import write_measured_run

from hvdtrain import cli
from hvdtrain.comm.world import World
from hvdtrain.config import load_config
from hvdtrain.errors import CheckpointError, ConfigError
from hvdtrain.planner.cluster import read_cluster
from hvdtrain.planner.cost import work_of
from hvdtrain.planner.estimate import estimate
from hvdtrain.planner.fastest import _row, in_order
from hvdtrain.planner.measured import read_run
from hvdtrain.planner.outlook import link_in

SMALL = ["model.layers=2", "model.heads=2", "model.width=32", "model.context=16", "eval.rows=4", "device=cpu"]
SMALL += ["train.steps=3000", "schedule.warmup_steps=3", "train.global_batch=16", "train.microbatch=2"]
FIGURES = {
    "ranks_per_node": 2, "memory_gib": 4, "tflops": 0.05, "memory_gb_per_s": 10, "inside_gb_per_s": 5, "inside_us": 10,
    "between_gb_per_s": 1, "between_us": 50, "save_gb_per_s": 1, "failures_per_rank_day": 0.5, "restart_s": 5,
    "requeue_s": 5, "watts_per_node": 500,
}  # fmt: skip


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command prints."""
    parsed = cli._parse(["plan", "demo", "--vocab-size", "50", *words])
    assert parsed.run(parsed, World()) == 0
    return capsys.readouterr().out


def measured(folder: Path, nodes: int, per_node: int, step_s: float, *words: str, lines: int = 5, **job: object) -> str:
    """A run's folder as training leaves it."""
    config = load_config("demo", [*SMALL, *words])
    return str(write_measured_run(folder, config, nodes, per_node, step_s, lines, **job))


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    figures = {name: {"value": value, "source": "a test"} for name, value in FIGURES.items()}
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump({"name": "ours", "figures": figures}))
    return str(tmp_path / "ours.yaml")


# --- from runs -----------------------------------------------------------------------------------------------------


def test_a_run_is_read_as_it_was(tmp_path: Path):
    run = read_run(Path(measured(tmp_path / "a", 2, 2, 0.5)))
    assert (run.nodes, run.ranks, run.ranks_per_node) == (2, 4, 2)
    assert run.step_s == pytest.approx(0.5)  # the start-up's line is left out
    assert run.parts["sync"] == pytest.approx(0.1)
    assert (run.rows, run.microbatches, run.tokens_of_step) == (2, 2, 256)  # 16 rows over four, by two


def test_more_nodes_are_told_from_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Fixed global batch: 4, 2, 1 microbatches of 0.1 s, and 0.04 s that are paid once a step."""
    runs = [measured(tmp_path / str(n), n, 2, 0.1 * 4 / n + 0.04, "train.global_batch=16") for n in (1, 2)]
    words = [*SMALL, "--ranks", "8", "--from", *runs]
    tree = json.loads(plan(capsys, *words, "--json"))
    told = tree["from_runs"]
    assert [one["nodes"] for one in told["measured"]] == [1, 2]
    assert told["seconds"] == pytest.approx(0.14, rel=0.12)
    assert told["low"] < told["seconds"] < told["high"]
    assert tree["run_s"] == pytest.approx(3000 * tree["step_s"])
    assert tree["workload"]["nodes"] == 4  # two ranks a node, as the runs had
    text = plan(capsys, *words)
    assert re.search(r"80% of such predictions hold within 0\.1\d+ to 0\.\d+ s", text)
    assert "3,000 steps of" in text and "node hours" in text


def test_runs_on_one_machine_are_told_by_their_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = [measured(tmp_path / str(n), 1, n, 0.4, f"train.global_batch={4 * n}") for n in (1, 2)]
    text = plan(capsys, *SMALL, "train.global_batch=16", "--ranks", "4", "--from", *runs)
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d+ +2 +0\.", line)]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert float(rows[2][2]) == pytest.approx(0.42, rel=0.08)


def test_runs_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one = measured(tmp_path / "one", 1, 2, 0.5)

    def refused(error: type, said: str, *runs: str, ranks: int = 8, words: tuple = ()) -> None:
        with pytest.raises(error, match=said) as caught:
            plan(capsys, *SMALL, *words, "--ranks", str(ranks), "--from", *runs)
        assert "\n" not in str(caught.value)

    refused(ConfigError, "only runs on 2: how the time grows needs runs of two sizes", one)
    wide = measured(tmp_path / "wide", 2, 2, 0.5, "model.width=64")
    refused(ConfigError, "cannot be compared: model.width is 32 in .*one and 64 in .*wide", one, wide)
    other = measured(tmp_path / "gpu", 2, 2, 0.5, device="cuda")
    first = measured(tmp_path / "cpu", 1, 2, 0.5, device="cpu")
    refused(ConfigError, "device is cpu in .* and cuda in", first, other)
    full = measured(tmp_path / "full", 2, 4, 0.5)
    refused(ConfigError, "has 2 ranks a node, .*full 4", one, full)
    rows = measured(tmp_path / "rows", 2, 2, 0.5, "train.microbatch=4")
    refused(ConfigError, "a microbatch has 2 rows in .* and 4 in .*rows .set train.microbatch alike", one, rows)
    two = measured(tmp_path / "two", 2, 2, 0.5)
    refused(ConfigError, "the plan has microbatches of 1 rows, the runs of 2", one, two, words=("train.microbatch=1",))
    refused(ConfigError, "mesh.tensor=1 mesh.pipeline=1, the plan another mesh", one, two, words=("mesh.tensor=2",))
    short = measured(tmp_path / "short", 2, 2, 0.5, lines=2)
    refused(CheckpointError, "2 lines in metrics.jsonl of its last job", one, short)
    refused(CheckpointError, "is not a run folder with a job's record", str(tmp_path / "nowhere"), one)
    refused(ConfigError, "--from optim.lr=1: no such folder; settings stand before --from", one, "optim.lr=1")


# --- from a cluster ------------------------------------------------------------------------------------------------


def test_a_step_on_a_cluster(cluster: str, capsys: pytest.CaptureFixture[str]):
    tree = json.loads(plan(capsys, *SMALL, "--ranks", "4", "--cluster", cluster, "--json"))
    parts = tree["from_cluster"]
    assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k not in ("cluster", "total")))
    assert parts["compute"] == pytest.approx(tree["workload"]["flops_of_step"] / 0.05e12)
    assert parts["exchange"] > 0
    assert tree["workload"]["nodes"] == 2
    text = plan(capsys, *SMALL, "--ranks", "4", "--cluster", cluster)
    assert "time of a step on ours" in text
    assert "assumed of it: tokens_for_half, operation_us, growth_s, jitter" in text
    # Fewer bytes on the wire, less time.
    narrow = json.loads(
        plan(capsys, *SMALL, "sync.allreduce.wire=bf16", "--ranks", "4", "--cluster", cluster, "--json")
    )
    assert narrow["from_cluster"]["exchange"] < parts["exchange"]


def test_meshes_by_time(cluster: str, capsys: pytest.CaptureFixture[str]):
    words = [*SMALL, "--ranks", "4", "--cluster", cluster, "--fit"]
    tree = json.loads(plan(capsys, *words, "--json"))
    times = [row["step_s"] for row in tree["meshes"]]
    assert times == sorted(times) and len(times) > 2
    assert {(row["tensor"], row["pipeline"]) for row in tree["meshes"]} >= {(1, 1), (2, 1), (1, 2)}
    assert any("mesh.tensor=4" in reason for reason in tree["refused"])  # of two heads
    assert "fastest first" in plan(capsys, *words)


def test_zero_has_buckets_and_a_wire_of_its_own(cluster: str):
    """Where links are slow, two-byte numbers are worth it: under the name that ZeRO reads."""
    words = [*SMALL, "sync.name=zero", "sync.zero.bucket_mib=0.125", "sync.allreduce.bucket_mib=64"]
    plan = estimate(load_config("demo", words), 2, 1, 50)
    assert work_of(plan).bucket_bytes == 2**17
    slow = read_cluster(cluster)
    (found,) = in_order([plan], replace(slow, figures={**slow.figures, "between_gb_per_s": 0.01}), 2, 1, 50)
    assert (found.plan.config.sync.zero.wire, found.plan.config.sync.allreduce.wire) == ("bf16", "fp32")
    assert _row(found)["wire"] == "bf16"


def test_ranks_are_as_fast_as_runs_have_measured(tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]):
    """32 tokens in .06 s and 64 in .1 s: .02 s, and .04 s for every 32; in half a layer the .02 s stay."""
    # Of 16 rows a rank has 8: 4 microbatches of two, or 2 of four. Computing is .7 of a step, the optimizer .1.
    small = measured(tmp_path / "small", 1, 2, 4 * 0.06 / 0.7)
    large = measured(tmp_path / "large", 1, 2, 2 * 0.10 / 0.7, "train.microbatch=4")
    words = [*SMALL, "--ranks", "2", "--cluster", cluster, "--fit", "--from"]
    tree = json.loads(plan(capsys, *words[:-1], "--json", "--from", small, large))
    assert tree["figures"]["tokens_for_half"] == pytest.approx(16)
    compute = {(row["tensor"], row["pipeline"]): row["parts_s"]["compute"] for row in tree["meshes"]}
    assert compute[1, 1] == pytest.approx(4 * 0.06)
    assert compute[1, 2] == pytest.approx(8 * 0.06 / 2)
    assert compute[2, 1] == pytest.approx(8 * (0.04 / 2 + 0.02))
    optimizer = {(row["tensor"], row["pipeline"]): row["parts_s"]["optimizer"] for row in tree["meshes"]}
    assert optimizer[1, 1] == pytest.approx(0.1 * (4 * 0.06 + 2 * 0.10) / 2 / 0.7, rel=1e-3)
    assert "measured by 2 runs: tflops" in plan(capsys, *words, small, large)
    # Of one size: tokens_for_half stays as the file has it.
    tree = json.loads(plan(capsys, *words[:-1], "--json", "--from", small))
    assert tree["figures"]["tokens_for_half"] == 0
    assert tree["meshes"][0]["parts_s"]["compute"] == pytest.approx(4 * 0.06)
    (said,) = [line for line in plan(capsys, *words, small).splitlines() if "measured by 1 run:" in line]
    assert "tflops" in said and "tokens_for_half" not in said


def test_runs_that_do_not_say_how_fast_a_rank_is(tmp_path: Path, cluster: str, capsys: pytest.CaptureFixture[str]):
    def refused(said: str, *runs: str) -> None:
        with pytest.raises(ConfigError, match=said):
            plan(capsys, *SMALL, "--ranks", "2", "--cluster", cluster, "--fit", "--from", *runs)

    refused("mesh.tensor=2 mesh.pipeline=1 .*runs of whole models", measured(tmp_path / "a", 1, 2, 1, "mesh.tensor=2"))
    refused("sync.name=zero: how fast", measured(tmp_path / "b", 1, 2, 1, "sync.name=zero"))
    refused("model.width=64, the recipe 32", measured(tmp_path / "c", 1, 2, 1, "model.width=64"))
    small = measured(tmp_path / "small", 1, 2, 1)
    quick = measured(tmp_path / "quick", 1, 2, 0.4, "train.microbatch=4")
    refused("microbatches of 32 and 64 tokens: the larger take no longer", small, quick)


def test_what_does_not_fit_is_said(cluster: str, capsys: pytest.CaptureFixture[str]):
    tree = yaml.safe_load(Path(cluster).read_text())
    tree["figures"]["memory_gib"]["value"] = 0.1
    Path(cluster).write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"nothing fits 1 ranks of 0.1 GiB: mesh.tensor=1 .* a rank needs"):
        plan(capsys, *SMALL, "train.microbatch=1", "recompute.name=full", "--ranks", "1", "--cluster", cluster, "--fit")


# --- the whole run -------------------------------------------------------------------------------------------------


def test_the_whole_run(cluster: str, capsys: pytest.CaptureFixture[str]):
    words = [*SMALL, "train.steps=20000000", "--ranks", "4", "--cluster", cluster, "--simulate"]
    tree = json.loads(plan(capsys, *words, "--link", "24h=2h", "--link", "1h=10min", "--json"))
    long, short = tree["simulated"]
    assert (long["link_s"], short["link_s"]) == (86_400, 3600)
    for one in (long, short):
        assert one["calendar_s"] == sorted(one["calendar_s"])
        assert one["calendar_s"][0] > 0.99 * tree["run_s"]
        assert 0 < one["effective"][1] <= one["goodput"][1] <= 1
        assert one["energy_mwh"][1] == pytest.approx(one["node_hours"][1] * 500 / 1e6, rel=0.05)
    assert short["jobs"][1] > long["jobs"][1]
    text = plan(capsys, *words, "--link", "24h=2h", "--link", "1h=10min")
    assert "the whole run, simulated 400 times" in text and " *" in text and "MWh" in text
    calm = json.loads(plan(capsys, *words, "--json"))["simulated"]
    assert calm[0]["link_s"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fit"], "--fit needs --cluster"),
        (["--simulate"], "--simulate needs --cluster"),
        (["--cluster", "llama3", "--link", "24h=2h"], "--link is of --simulate"),
        (["--cluster", "llama3", "--simulate", "--fit"], "--fit and --simulate are two questions"),
        (["--cluster", "llama3", "--memory", "1GiB"], "--memory and --cluster are two questions"),
        (["--cluster", "llama3", "--simulate", "--link", "soon"], "--link soon: expected WALLTIME=WAIT, like 24h=2h"),
        (["--cluster", "llama"], "no cluster 'llama'; there are: "),
        (["--cluster", "llama3", "--from", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_words_that_do_not_go_together(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises((ConfigError, CheckpointError), match=said):
        plan(capsys, *SMALL, "--ranks", "2", *words)


def test_lengths_of_jobs():
    assert link_in("24h=2h") == (86_400, 7200)
    assert link_in("90min=0s") == (5400, 0)
    assert link_in("1.5d") == (129_600, 0)
    for text in ("24", "24h=", "=2h", "0h=1h", "24h=two", ""):
        with pytest.raises(ConfigError, match="expected WALLTIME=WAIT"):
            link_in(text)
