"""Families as option sets: what stands under a recipe's keys, and what a run saves of it."""

import pytest
import yaml

from hvdtrain.config import dump_yaml, load_config, make_config
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Encoder
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.presets import PRESETS
from hvdtrain.models.seq2seq import Seq2Seq

KINDS = {
    Decoder: ("gpt2", "llama", "qwen2", "starcoder2"),
    Encoder: ("bert",),
    Seq2Seq: ("vaswani", "marian", "bart", "mbart", "pegasus", "blenderbot", "t5", "t5_v1_1"),
}


@pytest.mark.parametrize(("kind", "preset"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_each_is_an_option_set_of_its_own_that_makes_a_model(kind: type, preset: str):
    options = TransformerOptions(preset=preset, layers=1, width=16, context=8)
    kind(options, 20).initialise(0)
    for key, value in PRESETS[preset].items():
        assert getattr(options, key) == value != TransformerOptions.model_fields[key].default
    assert sorted(PRESETS) == sorted(name for names in KINDS.values() for name in names)
    assert [name for name in PRESETS if PRESETS[name] == PRESETS[preset]] == [preset]


def test_the_keys_of_a_recipe_stand_above_it():
    config = load_config("demo", ["model.preset=bert", "model.norm_eps=1e-6"])
    assert (config.model.norm, config.model.positions) == ("rmsnorm", "rotary")  # demo's own
    assert (config.model.norm_first, config.model.token_types, config.model.norm_eps) == (False, 2, 1e-6)


def test_saved_settings_are_resolved():
    """A key that is given as the default is given, too."""
    config = make_config({"model": {"preset": "t5", "norm_eps": 1e-5}}, "a test")
    saved = yaml.safe_load(dump_yaml(config))
    assert saved["model"]["positions"] == "relative"
    assert saved["model"]["norm_eps"] == 1e-5
    assert make_config(saved, "saved") == config
