"""The sizes of a run on a number of ranks: by the recipe, by the rows of its task."""

import pytest

from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.config import RunConfig, make_config
from hvdtrain.errors import ConfigError
from hvdtrain.sizing import check_shareable, feed_of, resolved, scaled, sized


def recipe(task: str = "lm", scaling: dict | None = None, **train) -> RunConfig:
    tree = {"task": {"name": task}, "model": {"context": 64}, "train": train, "scaling": scaling or {}}
    return make_config({**tree, "schedule": {"warmup_steps": 0}}, "a test")


def test_tokens_of_an_update_are_whole_rows_where_rows_are_alike():
    assert feed_of(recipe(global_tokens=640), 0, 1).global_batch == 10
    with pytest.raises(ConfigError, match=r"train\.global_tokens=650 is not a multiple of .*; set it to 640$"):
        feed_of(recipe(global_tokens=650), 0, 1)
    assert feed_of(recipe("seq2seq", global_tokens=650), 0, 1).global_tokens == 650


def test_ranks_share_rows_that_are_alike_evenly_and_others_as_can_be():
    check_shareable(recipe(global_batch=6), 3)
    with pytest.raises(ConfigError, match="cannot be shared evenly by 4 ranks"):
        check_shareable(recipe(global_batch=6), 4)
    check_shareable(recipe("classify", global_batch=6), 4)


def test_ranks_that_share_a_model_share_its_rows():
    """Six rows by four ranks: as two replicas of a model over two ranks each."""
    mesh = MeshOptions(tensor=2)
    cut = recipe(global_batch=6).model_copy(update={"mesh": mesh})
    check_shareable(cut, mesh.replicas_of(4))
    with pytest.raises(ConfigError, match=r"evenly by 4 replicas; set train.global_batch=4 or 8, or start 3 replicas"):
        check_shareable(cut, mesh.replicas_of(8))


def test_a_batch_that_grows_with_the_ranks_is_resolved_once():
    given = recipe(scaling={"per_rank": True, "rule": "linear"}, global_batch=4, tokens=64 * 4 * 100)
    assert sized(given, 8).train.global_batch == 32
    found = resolved(given, scaled(given, 8, epoch_tokens=0))
    assert (found.train.global_batch, found.train.steps, found.train.tokens) == (32, 13, 0)  # 100 / 8, rounded up
    assert found.optim.lr == pytest.approx(8 * given.optim.lr)
