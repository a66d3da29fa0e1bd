"""``hvdtrain scaling``: what is trained at each size, what is concluded and refused; one measurement here."""

import json
from pathlib import Path

import pytest
from launch import Prepared, launch, succeed
from measured_runs import write_measured_run

from hvdtrain import cli
from hvdtrain.comm.world import World
from hvdtrain.commands.scaling.picture import draw
from hvdtrain.commands.scaling.points import Point, Series, points_of, whole_run
from hvdtrain.commands.scaling.report import as_page, as_text, as_tree
from hvdtrain.commands.scaling.results import Found, conclude, read_result
from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.planner.measured import read_runs


def series(prepared: Prepared, kind: str, *words: str, nodes: tuple[int, ...] = (1, 2, 4)) -> Series:
    return Series(str(prepared.recipe), ["device=cpu", *words], kind, nodes, 1, 24)  # type: ignore[arg-type]


def shares(points: list[Point]) -> list[tuple[int, int, int]]:
    """Of each: tokens of a step, rows of a microbatch, microbatches."""
    loads = [point.plan.load for point in points]
    return [(load.global_tokens, load.microbatch, load.microbatches) for load in loads]


# --- what is trained -----------------------------------------------------------------------------------------------


def test_strong_shares_the_batch_weak_multiplies_it(prepared: Prepared):
    """12 rows of 16 tokens; the microbatch is what the most ranks can have, so that times can be compared."""
    strong, weak = (series(prepared, kind) for kind in ("strong", "weak"))
    assert shares(points_of(strong, whole_run(strong))) == [(192, 3, 4), (192, 3, 2), (192, 3, 1)]
    assert shares(points_of(weak, whole_run(weak))) == [(192, 12, 1), (384, 12, 1), (768, 12, 1)]
    small = series(prepared, "weak", "train.microbatch=4")
    assert shares(points_of(small, whole_run(small))) == [(192, 4, 3), (384, 4, 3), (768, 4, 3)]


def test_a_batch_that_grows_by_itself_is_that_of_the_fewest_nodes(prepared: Prepared):
    """Of two nodes here: scaling.per_rank makes 24 rows of the recipe's 12."""
    own = series(prepared, "strong", "scaling.per_rank=true", nodes=(2, 4))
    assert shares(points_of(own, whole_run(own))) == [(384, 6, 2), (384, 6, 1)]


def test_runs_are_short_whatever_the_recipe_says(prepared: Prepared):
    words = ("train.epochs=3", "schedule.warmup_steps=0", "schedule.warmup_epochs=1", "eval.every=1")
    long = series(prepared, "strong", *words)
    config = points_of(long, whole_run(long))[0].plan.config
    assert (config.train.steps, config.schedule.warmup_steps, config.eval.every, config.metrics.every) == (24, 0, 0, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nodes 1", "one size says nothing of others"),
        ("--nodes 2,1", "numbers that rise"),
        ("--nodes 1,x", "--nodes 1,x: expected numbers above 0"),
        ("--nodes 0,1", "--nodes 0,1: expected numbers above 0"),
        ("--nodes 1,5 --here", r"5 ranks on 5 nodes: .*12"),
        ("--nodes 2,3 --kind weak --here", "3 is no multiple of 2"),
        ("--nodes 1,2 --steps 3", "--steps 3: give 12 or more"),
        ("--nodes 1,2 --ranks-per-node 0", "--ranks-per-node 0: give 1 or more"),
        ("--nodes 2,4 --predict 1 --here", "--predict 1: fewer nodes"),
        ("--nodes 1,2 --here --partition p", "--partition is of Slurm jobs"),
        ("--nodes 1,2 --bandwidth 1gbit", "--bandwidth goes with --here"),
        ("--nodes 1,2 --here --bandwidth fast", "--bandwidth fast: expected a bandwidth"),
        ("--nodes 1,2 --here mesh.tensor=4", "mesh"),
    ],
)
def test_words_that_cannot_be_meant(prepared: Prepared, tmp_path: Path, words: str, said: str):
    given = words if "--kind" in words else f"{words} --kind strong"
    parsed = cli._parse(["scaling", str(prepared.recipe), "device=cpu", "--out", str(tmp_path / "o"), *given.split()])
    with pytest.raises(ConfigError, match=said):
        parsed.run(parsed, World())
    assert not (tmp_path / "o").exists()


# --- what is concluded ---------------------------------------------------------------------------------------------


def conclusion(prepared: Prepared, folder: Path, kind: str, times: dict[int, float], *asked: int) -> Found:
    """As if a step had taken these times on so many nodes."""
    of_all = series(prepared, kind, "train.microbatch=1", nodes=(1, 2, 4))
    whole = whole_run(of_all)
    points = [point for point in points_of(of_all, whole) if point.nodes in times]
    for point in points:
        write_measured_run(folder / point.name, point.plan.config, point.nodes, 1, times[point.nodes])
    runs = read_runs([folder / point.name for point in points])
    return conclude(of_all, whole, [read_result(*both) for both in zip(points, runs, strict=True)], asked)


def test_speed_up_and_what_the_whole_run_costs(prepared: Prepared, tmp_path: Path):
    found = conclusion(prepared, tmp_path, "weak", {1: 1.0, 2: 1.25, 4: 1.25})
    rates = [result.tokens_per_s for result in found.results]
    assert rates == pytest.approx([192, 2 * 192 / 1.25, 4 * 192 / 1.25])
    sizes = [result.point.nodes for result in found.results]
    assert [found.efficiency(*one) for one in zip(sizes, rates, strict=True)] == pytest.approx([1.0, 0.8, 0.8])
    assert found.speed_up(rates[2]) == pytest.approx(3.2)
    # 12 steps of 192 tokens: the same tokens, in fewer steps of a larger batch.
    assert [found.run_s(rate) for rate in rates] == pytest.approx([12.0, 7.5, 3.75])
    assert [one.nodes for one in found.beyond] == [8, 16, 32]
    assert [one.tokens for one in found.beyond] == [8 * 192, 16 * 192, 32 * 192]
    for one in found.beyond:
        assert one.step.low < one.step.seconds < one.step.high and one.step.seconds > 1.2


def test_nothing_is_told_of_more_nodes_than_can_share_a_batch(prepared: Prepared, tmp_path: Path):
    """12 rows, one at a time: 12 nodes have one each; of 16 nobody knows what they would do."""
    times = {1: 1.24, 2: 0.64, 4: 0.34}
    found = conclusion(prepared, tmp_path, "strong", times)
    assert [(one.nodes, one.microbatches) for one in found.beyond] == [(8, 2)]
    assert found.checked is not None
    assert found.checked.seconds == pytest.approx(0.34, rel=0.05)
    asked = conclusion(prepared, tmp_path / "asked", "strong", times, 12, 16)
    assert [(one.nodes, one.microbatches) for one in asked.beyond] == [(12, 1)]
    assert asked.beyond[0].step.seconds == pytest.approx(0.14, rel=0.1)  # 0.1 s a microbatch, 0.04 a step


def test_one_size_says_that_it_says_nothing(prepared: Prepared, tmp_path: Path):
    found = conclusion(prepared, tmp_path, "weak", {2: 1.0})
    assert (found.beyond, found.checked) == ([], None)
    assert "One size alone says nothing" in as_text(found)
    page = as_page(found, "x", "", draw(found))
    assert any("2 sizes of 3 not finished" in getattr(block, "text", "") for block in page.blocks)


def test_the_tree_has_what_the_page_has(prepared: Prepared, tmp_path: Path):
    tree = json.loads(json.dumps(as_tree(conclusion(prepared, tmp_path, "weak", {1: 1.0, 2: 1.25, 4: 1.25}))))
    assert [one["step_s"] for one in tree["measured"]] == pytest.approx([1.0, 1.25, 1.25])
    assert [one["nodes"] for one in tree["predicted"]] == [8, 16, 32]
    assert tree["largest_from_smaller"]["seconds"] > 1.1


# --- on this machine -----------------------------------------------------------------------------------------------


def test_a_measurement_here(prepared: Prepared, tmp_path: Path):
    words = ("scaling", prepared.recipe, "--nodes", "1,2", "--kind", "weak", "--steps", 12, "--here", "--out", "out")
    done = succeed(*words, cwd=tmp_path, timeout_s=400)
    out = tmp_path / "out"
    tree = json.loads((out / "scaling.json").read_text())
    assert [one["ranks"] for one in tree["measured"]] == [1, 2]
    assert all(one["checkpoint_bytes"] > 10_000 and one["memory_peak_mib"] > 100 for one in tree["measured"])
    assert [one["nodes"] for one in tree["predicted"]] == [4, 8, 16]
    assert "80% of such predictions" in done.stdout
    text = (out / "scaling.md").read_text()
    assert "All nodes were parts of one machine" in text and "cores" in text
    assert {path.name for path in out.glob("scaling*")} == {
        "scaling.json", "scaling.html", "scaling.md", "scaling-speed.png"
    }  # fmt: skip
    again = succeed(*words, cwd=tmp_path, timeout_s=400)
    assert "nodes-1 is there" in again.stdout and "nodes-2 is there" in again.stdout
    other = launch(*words, "model.width=64", cwd=tmp_path)
    assert other.exit_code == 2
    assert "is of another measurement: model.width 32 there and 64 here" in other.stderr


def test_runs_that_cannot_be_compared_are_named(prepared: Prepared, tmp_path: Path):
    of_all = series(prepared, "weak", nodes=(1, 2))
    points = points_of(of_all, whole_run(of_all))
    for point, device in zip(points, ("cuda", "cpu"), strict=True):
        write_measured_run(tmp_path / point.name, point.plan.config, point.nodes, 1, 1.0, device=device)
    with pytest.raises(HvdtrainError, match=r"device is cuda in .*nodes-1 and cpu in .*nodes-2"):
        read_runs([tmp_path / point.name for point in points])
