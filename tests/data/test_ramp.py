"""A batch that grows: sizes by arithmetic, the same rows in the same order as without a ramp, exact from any row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import Prepared, launch, succeed, summary

from hvdtrain.config import make_config
from hvdtrain.data.loader import Feed
from hvdtrain.data.ramp import Ramp
from hvdtrain.errors import ConfigError
from hvdtrain.sizing import feed_of, scaled


def steps_of(ramp: Ramp, rows: int) -> list[int]:
    """Sizes of the steps until ``rows`` are consumed, one after another."""
    sizes, at = [], 0
    while at < rows:
        sizes.append(ramp.size_at(at))
        at += sizes[-1]
    return sizes


def test_the_picture():
    """Megatron-LM: 4 + floor(consumed / (48 / 3)) * 4, until 48 rows are consumed."""
    assert steps_of(Ramp(4, 4, 48, 16), 100) == [4, 4, 4, 4, 8, 8, 12, 12, 16, 16, 16]


@st.composite
def ramps(draw: st.DrawFn) -> Ramp:
    start, increment, sizes = draw(st.integers(1, 20)), draw(st.integers(1, 9)), draw(st.integers(1, 12))
    return Ramp(start, increment, draw(st.integers(sizes, 500)), start + sizes * increment)


@given(ramps(), st.integers(0, 700))
def test_by_arithmetic_as_one_after_another(ramp: Ramp, rows: int):
    sizes = steps_of(ramp, rows)
    assert ramp.steps_to(rows) == len(sizes)
    assert sizes == sorted(sizes)
    assert all(ramp.start <= size <= ramp.full for size in sizes)
    at = 0
    while at < rows:  # runs of equal steps, as a source makes them
        alike = ramp.steps_alike(at, 7)
        assert 1 <= alike <= 7
        assert {ramp.size_at(at + n * ramp.size_at(at)) for n in range(alike)} == {ramp.size_at(at)}
        at += alike * ramp.size_at(at)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ramp_start": 32}, "train.ramp_start=32 must be below the batch of 32 sequences"),
        ({"ramp_start": 8, "ramp_increment": 7}, "it has to divide 24"),
        ({"ramp_start": 8}, "it has to divide 24"),
        ({"ramp_start": 8, "ramp_increment": 8, "ramp_tokens": 64}, "fewer than the ramp has sizes"),
        ({"ramp_increment": 8}, "need train.ramp_start"),
    ],
)
def test_what_is_no_ramp(settings: dict[str, int], message: str):
    config = make_config({"train": {"global_batch": 32, **settings}, "model": {"context": 64}}, "test")
    with pytest.raises(ConfigError, match=message):
        feed_of(config, 0, 1)


def test_ranks_that_cannot_share_a_batch_on_the_way():
    train = {"global_batch": 32, "microbatch": 4, "ramp_start": 8, "ramp_increment": 12, "ramp_tokens": 6400}
    config = make_config({"train": train, "model": {"context": 64}}, "test")
    assert isinstance(feed_of(config, 0, 1), Feed)
    with pytest.raises(ConfigError, match="a batch of 20 sequences on the way from"):
        feed_of(config, 1, 4)


def test_only_where_rows_are_alike():
    config = make_config({"train": {"ramp_start": 8}, "task": {"name": "seq2seq"}}, "test")
    with pytest.raises(ConfigError, match="is for task"):
        feed_of(config, 0, 1)


def test_lengths_in_tokens_take_more_steps():
    """320 rows: 40 steps of 8; growing from 2 by 2 over 48 rows of 16 tokens, 24 of them take 8 + 4 + 3 steps."""
    train = {"global_batch": 8, "tokens": 320 * 16}
    ramp = {"ramp_start": 2, "ramp_increment": 2, "ramp_tokens": 48 * 16}
    schedule = {"warmup_tokens": 64 * 16}
    plain, grown = (
        scaled(make_config({"train": {**train, **more}, "schedule": schedule, "model": {"context": 16}}, "test"), 1, 0)
        for more in ({}, ramp)
    )
    assert (plain.steps, plain.warmup_steps) == (40, 8)
    sizes = steps_of(Ramp(2, 2, 48, 8), 320)
    assert sizes[:15] == [2] * 8 + [4] * 4 + [6] * 3
    assert grown.steps == len(sizes)
    assert grown.warmup_steps == len(steps_of(Ramp(2, 2, 48, 8), 64))
    in_steps = make_config({"train": {"global_batch": 8, "steps": 500, **ramp}, "model": {"context": 16}}, "test")
    assert scaled(in_steps, 1, 0).steps == 500  # updates of the run, whatever their size


RAMP = ("train.ramp_start=4", "train.ramp_increment=4", "train.ramp_tokens=512", "train.steps=12")


@pytest.fixture(scope="module", params=["windows", "packed"])
def ramped(request, prepared: Prepared, tmp_path_factory: pytest.TempPathFactory):
    """Settings, and the summary of an unbroken run: 32 rows of ramp in 4 + 2 + ... steps."""
    run_dir = tmp_path_factory.mktemp("ramp") / "run"
    words = ("train", prepared.recipe, *RAMP, f"task.lm.rows={request.param}", "metrics.every=1")
    succeed(*words, "--run-dir", run_dir)
    return words, summary(run_dir)


def test_the_same_rows_on_other_ranks_and_after_a_stop(ramped, tmp_path):
    words, expected = ramped
    succeed(*words, "--run-dir", tmp_path / "two", how="mpirun", ranks=2)
    found = summary(tmp_path / "two")
    assert (found["sample_digest"], found["tokens"]) == (expected["sample_digest"], expected["tokens"])
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)
    stopped = launch(*words, "--run-dir", tmp_path / "cut", env={"HVDTRAIN_END_TIME": "1"})
    assert stopped.exit_code == 75, stopped  # in the middle of the ramp
    succeed(*words, "train.microbatch=2", "--run-dir", tmp_path / "cut")
    found = summary(tmp_path / "cut")
    assert (found["sample_digest"], found["tokens"]) == (expected["sample_digest"], expected["tokens"])
    assert found["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-4)


def test_a_ramp_changes_sizes_not_the_order(ramped, prepared: Prepared, tmp_path):
    """Rows 0, 1, 2 ... in turn: as many as the ramped run consumed, by steps of 4, are the same ones."""
    words, expected = ramped
    rows = sum(steps_of(Ramp(4, 4, 32, 12), 10_000)[:12])
    plain = [word for word in words if not str(word).startswith("train.")]
    sizes = ("train.global_batch=4", f"train.steps={rows // 4}")
    succeed(*plain[:2], *sizes, *plain[2:], "--run-dir", tmp_path / "plain")
    assert rows % 4 == 0
    assert summary(tmp_path / "plain")["sample_digest"] == expected["sample_digest"]
