"""Over which ranks a trained model is spread, when it is used again."""

from pathlib import Path

import pytest
from threads import ThreadGroup, on_ranks

from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.comm.world import World
from hvdtrain.config import make_config
from hvdtrain.errors import EXIT_USAGE, ConfigError, RankError
from hvdtrain.trained import Run, open_mesh, parse_mesh


def opened(ranks: int, trained_on: dict[str, int], asked: str = "") -> tuple[int, int, int]:
    """(replicas, tensor, pipeline) of a run that was trained with that mesh."""
    tree = {"mesh": trained_on, "device": "cpu", "compile": "model", "cut": {"schedule": "gpipe"}}
    run = Run(Path("runs/large"), make_config(tree, "a test"), Path("step-1"), Progress(step=1), None)

    def work(group: ThreadGroup) -> tuple[int, int, int]:
        mesh = open_mesh(run, parse_mesh(asked), World(), group)
        return mesh.replicas, mesh.tensor.size, mesh.pipe.size

    return on_ranks(ranks, work)[0]


CUT = {"tensor": 2, "pipeline": 2}


def test_a_run_is_whole_on_one_rank_and_on_several_as_it_was_trained():
    assert opened(1, CUT) == (1, 1, 1)
    assert opened(4, CUT) == (1, 2, 2)
    assert opened(8, CUT) == (2, 2, 2)
    assert opened(3, {}) == (3, 1, 1)


def test_another_mesh_is_asked_for():
    assert opened(2, CUT, "pipeline=2") == (1, 1, 2)
    assert opened(2, {}, "tensor=2") == (1, 2, 1)
    assert opened(3, CUT, "tensor=1") == (3, 1, 1)
    assert parse_mesh("pipeline=3,tensor=2") == MeshOptions(tensor=2, pipeline=3)
    assert parse_mesh("") is None


@pytest.mark.parametrize(
    ("ranks", "asked", "message"),
    [
        (
            3,
            "",
            r"large was trained with mesh.tensor=2 mesh.pipeline=2, which 3 ranks cannot be; start 1 rank, .*--mesh",
        ),
        (3, "tensor=2", "takes 2 ranks a replica, and 3 is not a multiple of it; start 2 or 4"),
        (3, "tensor=3", r"mesh.tensor=3 does not divide model.heads=4"),
    ],
)
def test_what_cannot_be_has_a_way_out(ranks: int, asked: str, message: str):
    with pytest.raises(RankError, match=message) as caught:
        opened(ranks, CUT, asked)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    "text", ["tensor", "tensor=0", "tensor=two", "data=2", "tensor=2,tensor=2", "tensor=2,", "2x2"]
)
def test_words_that_are_no_mesh(text: str):
    with pytest.raises(ConfigError, match=rf"--mesh {text}: expected tensor=N,pipeline=N"):
        parse_mesh(text)
