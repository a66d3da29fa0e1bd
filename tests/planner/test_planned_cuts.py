"""The plan of a model over ranks: what each holds and sends by hand, a whole run's peak, and meshes that fit."""

import json
from dataclasses import replace

import pytest
from launch import Prepared, succeed, summary

from hvdtrain.config import RunConfig, load_config, make_config
from hvdtrain.cut.schedules import SCHEDULES
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.errors import ConfigError
from hvdtrain.planner.dry_run import Footprint
from hvdtrain.planner.memory import alive, memory
from hvdtrain.planner.proposals import bytes_in, plan_meshes
from hvdtrain.planner.shares import balance, shares_of
from hvdtrain.planner.workload import workload

FACTS = CorpusFacts(vocab_size=50)
SIZES = {"layers": 4, "heads": 4, "width": 32, "context": 24}
ONE = Footprint(before_loss=0, kept=10, of_layer=0, peak=25)


def settings(**tree) -> RunConfig:
    tree = {"train": {"steps": 5, "global_batch": 8, "microbatch": 1}, "schedule": {"warmup_steps": 2}, **tree}
    return make_config({**tree, "model": {**SIZES, **tree.get("model", {})}}, "a test")


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [("gpipe", (80, 95), (80, 95)), ("1f1b", (40, 55), (10, 25)), ("zero_bubble", (40, 55), (40, 55))],
)
def test_what_is_alive_follows_from_the_list_of_passes(schedule: str, first: tuple, last: tuple):
    """Four ranks, eight microbatches: of each 10 bytes are kept, and 25 needed while one is computed."""
    passes = SCHEDULES[schedule](4, 8, 1)
    assert alive(passes[0], [ONE] * 4) == first
    assert alive(passes[3], [ONE] * 4) == last
    heavy = [replace(ONE, kept=0), *[ONE] * 3]
    assert alive(passes[0], heavy) == (0, 25)


@pytest.mark.parametrize("task", ["lm", "seq2seq"])
def test_the_shares_of_all_ranks_are_the_model(task: str):
    config = settings(mesh={"pipeline": 2}, task={"name": task})
    whole = workload(settings(task={"name": task}), FACTS, 1).parameters
    first, second = shares_of(config, FACTS)
    shared = [name for name, holders in first.holders.items() if holders == 2]
    assert shared == [name for name, holders in second.holders.items() if holders == 2] != []
    doubled = sum(first.parameters[name].numel() for name in shared)
    assert first.count + second.count == whole + doubled
    assert 0.8 < balance([first, second]) <= 1
    (half,) = shares_of(settings(mesh={"tensor": 2}, task={"name": task}), FACTS)
    assert whole / 2 < half.count < 0.6 * whole


def test_a_rank_keeps_and_sends_what_its_axes_ask():
    def planned(ranks: int, **tree) -> tuple[dict[str, int], dict[str, int]]:
        config = settings(**tree)
        found = memory(config, FACTS, workload(config, FACTS, ranks), "cpu")
        return found.parts, found.sent

    whole, alone = planned(1)
    assert set(alone.values()) == {0}
    parts, sent = planned(2, mesh={"pipeline": 2})
    stream = 24 * 32 * 4  # bytes of a microbatch of one row
    assert sent["pipe"] == 8 * stream  # of eight, forward or their gradients
    assert 0.4 * whole["weights"] < parts["weights"] < 0.7 * whole["weights"]
    parts, sent = planned(2, mesh={"tensor": 2}, cut={"sequence": False})
    # A block sums twice forward and twice backward; the embedding once, the head's features once.
    assert sent["tensor"] == 8 * (4 * 4 + 2) * stream
    split, _ = planned(2, mesh={"tensor": 2})
    assert split["activations"] < parts["activations"] < whole["activations"]
    parts, sent = planned(2, sync={"name": "zero"})
    assert parts["optimizer state"] == whole["optimizer state"] // 2
    assert (
        planned(2, sync={"name": "zero", "zero": {"stage": 2, "bucket_mib": 0.01}})[0]["gradients"]
        < (parts["gradients"])
    )


def test_within_a_tenth_of_the_measured_peak_of_a_pipeline(prepared: Prepared, tmp_path):
    sizes = ["model.layers=4", "model.heads=6", "model.width=384", "model.context=256", "model.vocab_multiple=4096"]
    batch = ["train.global_batch=16", "train.microbatch=4", "eval.rows=4", "train.steps=2", "schedule.warmup_steps=1"]
    words = [*sizes, *batch, f"data.dir={prepared.shards}", "mesh.pipeline=2", "device=cpu"]
    succeed("train", "shakespeare-char", *words, "--run-dir", tmp_path / "run", how="mpirun", ranks=2, timeout_s=120)
    measured = summary(tmp_path / "run")
    printed = json.loads(succeed("plan", "shakespeare-char", "--ranks", 2, "--json", *words, timeout_s=120).stdout)
    assert printed["memory_peak_mib"] == pytest.approx(measured["memory_peak_mib"], rel=0.1)
    said = measured["mesh"]
    assert (said["pipeline"], said["schedule"], said["microbatches"]) == (2, "1f1b", 4)
    assert (said["bubble"], said["balance"]) == (0.2, printed["balance"])
    assert [line.partition(":")[2] for line in said["hosts"]] == [" 0", " 1"]


# --- proposals ----------------------------------------------------------------------------------------------------

LARGE = [
    "model.layers=2",
    "model.heads=4",
    "model.width=64",
    "train.microbatch=2",
    "sync.zero.bucket_mib=0.1",
    "device=cuda",
    "data.dir=/nowhere",
]

DEAR = ["train.microbatch=1", "recompute.name=full"]  # nothing else is left to try but ZeRO


def proposed(size: str, ranks: int, *words: str) -> dict:
    return json.loads(plan_meshes("gpt2-124m", [*LARGE, *words], ranks, size, vocab_size=1000, as_json=True))


def test_meshes_that_fit_come_with_least_traffic_first():
    found = proposed("1GiB", 4)
    meshes = [(one["tensor"], one["pipeline"]) for one in found["meshes"]]
    assert set(meshes) == {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)}
    traffic = [sum(one["sent_bytes"].values()) for one in found["meshes"]]
    assert traffic == sorted(traffic)
    assert {one["zero"] for one in found["meshes"]} == {0}
    assert found["refused"] == []


def test_less_memory_asks_for_more_and_says_what_does_not_fit():
    roomy = {(one["tensor"], one["pipeline"]): one["memory_bytes"] for one in proposed("1GiB", 2)["meshes"]}
    assert max(roomy, key=lambda mesh: roomy[mesh]) == (1, 1)
    (found,) = (one for one in proposed(f"{roomy[1, 1] - 1}B", 2)["meshes"] if one["tensor"] == one["pipeline"])
    assert (found["zero"], found["recompute"], found["microbatch"]) != (0, "none", 2)
    assert found["memory_bytes"] < roomy[1, 1]
    text = plan_meshes("gpt2-124m", [*LARGE, *DEAR], 2, "1MiB", vocab_size=1000)
    assert "none fits" in text
    assert text.count("GiB at least, of 0.00") == 3
    found = proposed("1GiB", 2, "model.heads=1")
    assert [reason for reason in found["refused"] if "mesh.tensor=2 does not divide model.heads=1" in reason]


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 << 30), ("24GB", 24 * 10**9), ("500 MiB", 500 << 20)])
def test_sizes(text: str, size: int):
    assert bytes_in(text) == size
    for wrong in ("much", "0GiB", "8 gib", "-1GiB"):
        with pytest.raises(ConfigError, match=rf"--memory {wrong}: expected a size like 80GiB"):
            bytes_in(wrong)


def test_what_no_mesh_would_change_is_one_message():
    with pytest.raises(ConfigError, match="give --vocab-size N"):
        plan_meshes("gpt2-124m", LARGE, 2, "1GiB")
    assert load_config("gpt2-124m").mesh.ranks == 1
