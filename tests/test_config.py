"""Recipes and overrides: what is wrong is named, with what would be right."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.config import (
    RunConfig,
    describe_options,
    dump_yaml,
    flatten,
    load_config,
    make_config,
    recipe_names,
    recipe_text,
    topology_of,
)
from hvdtrain.errors import EXIT_USAGE, ConfigError
from hvdtrain.strict_yaml import parse_yaml


@pytest.fixture
def recipe(tmp_path: Path):
    """``recipe("train: {steps: 3}")``: the path of such a file."""

    def write(text: str) -> str:
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def fail(source: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


# --- what is right -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_says_how_it_is_run(name: str):
    config = load_config(name)
    assert config.train.steps > 0
    assert f"train {name}" in recipe_text(name).partition("\nseed:")[0]


def test_the_known_recipes_are_there():
    assert {"demo", "gpt2-124m", "shakespeare-char"} <= set(recipe_names())


def test_overrides_are_dotted_and_the_last_one_wins(recipe):
    path = recipe("train: {steps: 3}\nmodel: {width: 32}\n")
    config = load_config(path, ["model.layers=7", "train.steps=200", "train.steps=201", "data.dir=a=b/ü c"])
    assert (config.model.layers, config.train.steps, config.model.width) == (7, 201, 32)
    assert config.data.dir == "a=b/ü c"
    assert load_config(recipe("")) == make_config({}, "nothing")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", ".1e-2", "0.001", "1.0e-3", "10e-4"])
def test_exponents_are_numbers(recipe, text: str):
    """YAML 1.1 alone reads 1e-3 as a word."""
    assert load_config(recipe(f"optim: {{lr: {text}}}")).optim.lr == pytest.approx(1e-3)
    assert load_config("demo", [f"optim.lr={text}"]).optim.lr == pytest.approx(1e-3)
    assert load_config("demo", ["data.dir=run-1e-3"]).data.dir == "run-1e-3"


def test_a_whole_number_may_stand_for_a_float():
    lr = load_config("demo", ["optim.lr=1"]).optim.lr
    assert (lr, type(lr)) == (1.0, float)


def test_yaml_anchors_work(recipe):
    path = recipe("train: &t {steps: 300}\ncheckpoint: {every: 5}\nmodel: {layers: 2}\n")
    assert load_config(path).checkpoint.every == 5
    merged = parse_yaml("base: &b {a: 1, c: 2}\nother: {<<: *b, a: 3}\n", "x")
    assert merged["other"] == {"a": 3, "c": 2}


@pytest.mark.parametrize("name", recipe_names())
def test_a_dumped_config_is_the_same_config(name: str):
    config = load_config(name, ["optim.lr=1.23e-5", "schedule.min_lr=0", "data.dir=datą/😀 x"])
    assert make_config(parse_yaml(dump_yaml(config), "dump"), "dump") == config


@given(st.floats(1e-12, 1e6), st.integers(0, 2**62), st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_any_value_survives_the_dump(lr: float, seed: int, folder: str):
    tree = {"seed": seed, "optim": {"lr": lr}, "data": {"dir": folder}}
    config = make_config(tree, "tree")
    assert make_config(parse_yaml(dump_yaml(config), "dump"), "dump") == config


# --- what is wrong -----------------------------------------------------------------------------------------------


def test_an_unknown_key_is_an_error_that_lists_the_valid_ones():
    message = fail("demo", "optim.weigth_decay=0.1")
    assert "unknown key 'optim.weigth_decay'" in message
    assert "did you mean optim.weight_decay" in message
    assert "optim.lr, optim.adamw_lr, optim.beta1" in message


def test_an_unknown_top_key_lists_the_rooms_too(recipe):
    """``modl`` is nearer to ``model`` than to ``seed``: both must be among what is named."""
    message = fail("demo", "modl.layers=3")
    assert "unknown key 'modl'" in message
    for key in RunConfig.model_fields:
        assert key in message, key


def test_all_that_is_wrong_is_one_message(recipe):
    message = fail(recipe("trian: {steps: 3}\nmodel: {width: x, layers: 0}\nseed: -1\n"))
    for part in ("trian", "model.width", "model.layers=0", "seed=-1"):
        assert part in message
    assert str(recipe("")) in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps=many", 'train.steps="many"'),
        ("train.steps='3'", 'train.steps="3"'),
        ("train.steps=true", "train.steps=true"),
        ("train.steps=3.5", "train.steps=3.5"),
        ("train.steps=3.0", "train.steps=3.0"),
        ("train.steps=1e3", "train.steps=1000.0"),
        ("train.steps=", "train.steps=null"),
        ("train.steps=[3]", "train.steps=[3]"),
        ("train.steps=0", "train.steps=0"),
        ("model.width=-128", "model.width=-128"),
        ("model.bias=1", "model.bias=1"),
        ("model.bias='yes'", 'model.bias="yes"'),
        ("data.dir=3", "data.dir=3"),
        ("optim.lr=fast", 'optim.lr="fast"'),
        ("optim.lr=true", "optim.lr=true"),
        ("optim.lr=.nan", "optim.lr=NaN"),
        ("optim.lr=.inf", "optim.lr=Infinity"),
        ("optim.lr=0", "optim.lr=0"),
        ("optim.beta2=1.0", "optim.beta2=1.0"),
        ("precision=fp8", "precision="),
        ("optim.name=adam", "optim.name="),
        ("model=3", "model=3"),
        ("train.steps.more=3", "train.steps.more"),
        ("seed=99999999999999999999999", "seed="),
        ("model.heads=3", "heads=3 does not divide width=256"),
        ("schedule.warmup_steps=401", "schedule.warmup_steps=401 is longer than train.steps=400"),
        ("sync.allreduce.bucket_mib=-1", "sync.allreduce.bucket_mib=-1"),
    ],
)
def test_wrong_values_are_named(override: str, part: str):
    """Nothing is coerced: true is no 1, 3.0 no 3, and no seed may be larger than torch can take."""
    assert part in fail("demo", override)


def test_a_warm_up_at_the_base_rate_needs_no_more_than_the_base():
    assert load_config("demo", ["schedule.warmup=constant"]).schedule.warmup_start == 0.0  # found with the rates


def test_choices_are_listed():
    message = fail("demo", "precision=fp8")
    assert "'fp32'" in message
    assert "'bf16'" in message


@pytest.mark.parametrize("override", ["optim.lr", "=3", "", "--fast"])
def test_an_override_needs_key_and_value(override: str):
    assert f"expected key=value (like optim.lr=3e-4), got {override!r}" in fail("demo", override)


def test_an_override_into_a_single_value(recipe):
    assert "unknown key 'seed.x': seed is a single value" in fail("demo", "seed.x=3")
    assert "unknown key 'train.steps.x.y'" in fail("demo", "train.steps.x.y=3")


def test_a_key_given_twice(recipe):
    assert "key 'steps' is given twice" in fail(recipe("train:\n  steps: 3\n  steps: 4\n"))
    assert "key 'train' is given twice" in fail(recipe("train: {steps: 3}\nseed: 1\ntrain: {steps: 4}\n"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n- b\n", "must be a mapping of keys to values, not list"),
        ("hello", "must be a mapping of keys to values, not str"),
        ("a: [1,\nb: 2\n", "line 3 is not valid YAML"),
        ("a: b: c", "line 1 is not valid YAML"),
        ("a: \x01", "is not valid YAML"),
        ("? [a, b]\n: 1", "my.yaml"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("1: 2", "my.yaml"),
        ("model:", "model"),
        ("a: 2024-99-99", "my.yaml"),
    ],
)
def test_a_file_that_is_no_recipe(recipe, text: str, part: str):
    message = fail(recipe(text))
    assert part in message
    assert "my.yaml" in message


def test_a_recipe_that_is_not_there(tmp_path: Path):
    for name in recipe_names():
        assert name in fail("no-such-recipe")
    assert f"cannot read recipe file {tmp_path}/x.yaml: No such file or directory" in fail(f"{tmp_path}/x.yaml")
    assert "Is a directory" in fail(f"{tmp_path}/")
    (tmp_path / "latin.yaml").write_bytes(b"data: {dir: caf\xe9}")
    assert "latin.yaml" in fail(f"{tmp_path}/latin.yaml")


# --- what makes a run what it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=401",
        "train.microbatch=2",
        "eval.every=1",
        "eval.rows=3",
        "checkpoint.every=7",
        "checkpoint.keep_last=9",
        "metrics.every=3",
        "metrics.tensorboard=false",
        "data.dir=elsewhere",
        "device=cpu",
        "sync.allreduce.bucket_mib=1",
    ],
)
def test_what_may_change_on_resuming(override: str):
    assert load_config("demo", [override]).identity() == load_config("demo").identity()


@pytest.mark.parametrize(
    "override",
    [
        "seed=2",
        "train.global_batch=32",
        "model.layers=5",
        "model.dropout=0.1",
        "optim.lr=1e-3",
        "optim.clip_norm=0",
        "schedule.warmup_steps=1",
        "precision=bf16",
    ],
)
def test_what_may_not(override: str):
    key = override.partition("=")[0]
    before, after = load_config("demo").identity(), load_config("demo", [override]).identity()
    assert [name for name in before if before[name] != after[name]] == [key]


def test_the_topology_is_known_before_the_ranks_have_met(tmp_path: Path):
    """Horovod has to be told when it starts; what is wrong is flat, and refused once all ranks can say so."""
    recipe = tmp_path / "a.yaml"
    recipe.write_text("sync: {allreduce: {topology: hierarchical}}\n", encoding="utf-8")
    assert topology_of(str(recipe), []) == "hierarchical"
    assert topology_of(str(recipe), ["sync.allreduce.topology=torus"]) == "torus"
    assert topology_of("demo", []) == topology_of("demo", ["sync.name=zero"]) == "flat"
    for wrong in (["sync.allreduce.topology=rong"], ["sync=1"], ["sync.allreduce.topology=[1]"], ["nothing"]):
        assert topology_of("demo", wrong) == "flat"
    assert topology_of("no such recipe", []) == "flat"


def test_every_option_is_described():
    rows = list(describe_options())
    everything = make_config({"model": {"from": "elsewhere", "lora": {}}}, "all groups")
    assert [row.key for row in rows] == list(flatten(everything.model_dump()))
    assert all(row.meaning and row.default and row.type for row in rows)
    types = {row.key: (row.type, row.default) for row in rows}
    assert types["precision"] == ("fp32|bf16|bf16-weights|fp16", "fp32")
    assert types["train.steps"] == ("int", "1000")
    assert types["model.bias"] == ("bool", "true")


def test_defaults_are_finite_numbers():
    values = flatten(RunConfig().model_dump()).values()
    assert all(math.isfinite(value) for value in values if isinstance(value, float))
    assert yaml.safe_load(dump_yaml(RunConfig())) == RunConfig().model_dump()
