"""What goes with what: the table, each of its refusals, and the page that shows it."""

import re
from pathlib import Path

import pytest

from hvdtrain.config import flatten, make_config
from hvdtrain.cut.combinations import COLUMNS, REFUSED, ROWS, bubble, check_combination, notes_on, notes_on_sync, table
from hvdtrain.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cuts.md"


def settings(**changed) -> dict:
    """Those of the defaults but for ``mesh__tensor=2`` and the like, whether or not a recipe may say so yet."""
    given = {key.replace("__", "."): value for key, value in changed.items()}
    return {**flatten(make_config({}, "a test").model_dump()), **given}


def test_the_page_shows_the_table():
    assert f"```\n{table()}\n```" in PAGE.read_text(encoding="utf-8")


def test_the_table_has_a_letter_for_every_refusal():
    text = table()
    body, _, reasons = text.partition("\n\n")
    letters = {letter for line in body.splitlines()[1:] for letter in re.findall(r" ([a-zA-Z])\b", line[27:])}
    assert letters == {line[0] for line in reasons.splitlines()}
    assert len(reasons.splitlines()) == len({(one.why, one.cure) for one in REFUSED})
    assert len({one.name for one in ROWS}) == len(ROWS)
    assert len(body.splitlines()) == 1 + len(ROWS)
    assert all(len(line.split("  ")) > len(COLUMNS) for line in body.splitlines())


PIPELINE = {"mesh__pipeline": 2}
ZERO = {"sync__name": "zero"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({**PIPELINE, **ZERO, "sync__zero__stage": 2}, r"stage=2 does not go with mesh.pipeline=2.*zero.stage=1$"),
        ({**PIPELINE, "compile": "model"}, "compile=model does not go with mesh.pipeline=2: .*; set compile=blocks$"),
        ({**PIPELINE, "cut__stages_per_rank": 2}, "per_rank=2 does not go with cut.schedule=1f1b: .*=interleaved$"),
        ({**PIPELINE, "cut__schedule": "interleaved"}, "per_rank=1 does not go with .*=interleaved: .*per_rank=2 or"),
        ({"mesh__tensor": 2, "sync__name": "parameter_server"}, r"_server does not go with mesh.tensor=2: .*or zero$"),
        ({**PIPELINE, "sync__name": "parameter_server"}, r"_server does not go with mesh.pipeline=2: .*or zero$"),
        ({"mesh__tensor": 2, "sync__name": "powersgd"}, "tensor=2 does not go with sync.name=powersgd: .*=allreduce$"),
        ({"sync__allreduce__combine": "adasum", **PIPELINE}, "adasum does not go with mesh.pipeline=2: .*combine=sum$"),
        ({"sync__allreduce__combine": "adasum", **ZERO}, "adasum does not go with sync.zero.stage=1: .*combine=sum$"),
        (
            {"sync__allreduce__combine": "adasum", "sync__allreduce__wire": "bf16"},
            "adasum does not go with sync.allreduce.wire=bf16: .*set sync.allreduce.wire=fp32$",
        ),
        (
            {"sync__name": "parameter_server", "sync__parameter_server__mode": "asynchronous", "optim__name": "muon"},
            "optim.name=muon does not go with .*mode=asynchronous: .*optim.name=adamw, or .*mode=synchronous",
        ),
        ({"sync__name": "sign"}, "optim.name=adamw does not go with sync.name=sign: .*optim.name=sgd.*clip_norm=0$"),
        ({"sync__name": "sign", "optim__name": "sgd", "optim__clip_norm": 0.0}, ".*; set optim.momentum=0$"),
        ({"mesh__tensor": 2, "balance__every": 5}, "tensor=2 does not go with balance.every=5: .*every=0$"),
        ({"balance__every": 5, "sync__name": "gossip"}, "every=5 does not go with sync.name=gossip: .*every=0$"),
        ({"balance__every": 5, "compile": "blocks"}, "compile=blocks does not go with .*=none, or balance.every=0$"),
        ({"balance__every": 5, "task__name": "span_qa"}, "task.name=span_qa does not go with balance.every=5: .*=0$"),
        (
            {"mesh__tensor": 3},
            "mesh.tensor=3 does not divide model.heads=4; set mesh.tensor=1, 2 or 4, or model.heads=6",
        ),
        (
            {"mesh__tensor": 4, "model__heads": 8, "model__kv_heads": 2},
            "mesh.tensor=4 does not divide model.kv_heads=2; set mesh.tensor=1 or 2, or model.kv_heads=4",
        ),
    ],
)
def test_what_is_refused_says_why_and_the_way_out(asked: dict, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        check_combination(settings(**asked))
    assert "\n" not in str(caught.value)


def test_all_that_does_not_fit_is_said_at_once():
    asked = settings(mesh__tensor=3, mesh__pipeline=2, compile="model", cut__stages_per_rank=2)
    with pytest.raises(ConfigError, match=r"compile=model.*stages_per_rank=2.*model.heads=4"):
        check_combination(asked)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"compile": "model", "cut__schedule": "interleaved", "cut__stages_per_rank": 3},  # nobody reads cut.* here
        {**ZERO, "sync__zero__stage": 2, "mesh__tensor": 4},
        {**ZERO, "sync__zero__stage": 1, **PIPELINE},
        {**ZERO, "sync__zero__stage": 2, "balance__every": 5, "task__name": "mlm"},
        {**PIPELINE, "cut__schedule": "interleaved", "cut__stages_per_rank": 2, "compile": "blocks"},
        {"mesh__tensor": 2, "model__heads": 8, "model__kv_heads": 2},
    ],
)
def test_what_fits_is_let_through(asked: dict):
    check_combination(settings(**asked))


def test_fewer_microbatches_than_stages_are_told_with_the_bubble():
    asked = settings(mesh__pipeline=4)
    assert bubble(asked, 8) == pytest.approx(3 / 11)
    halved = settings(mesh__pipeline=4, cut__schedule="interleaved", cut__stages_per_rank=2)
    assert bubble(halved, 8) == pytest.approx(3 / 19)
    assert notes_on(asked, 4) == notes_on(settings(), 1) == []
    (note,) = notes_on(asked, 2)
    assert re.search(
        r"mesh.pipeline=4 has more stages than .* microbatches \(2\): .* 60% of a step; lower train.mic", note
    )


def test_topk_into_adamw_is_warned_of():
    (note,) = notes_on_sync(settings(sync__name="topk"))
    assert "27 % higher" in note and "sync.name=powersgd" in note
    assert not notes_on_sync(settings(sync__name="topk", optim__name="sgd"))
    assert not notes_on_sync(settings())
