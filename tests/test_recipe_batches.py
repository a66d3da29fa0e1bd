"""Every shipped recipe says which batch its rates are for: another batch takes one setting."""

import pytest

from hvdtrain.config import load_config, recipe_names
from hvdtrain.sizing import scaled

EPOCH = 10_000_000  # tokens, where a recipe counts in epochs


@pytest.mark.parametrize("name", recipe_names())
def test_another_batch_is_one_setting(name: str):
    """Four times the batch: a quarter of the steps, and the rate by the rule that fits the optimizer. At its own batch
    a recipe is what it says.
    """
    as_given = load_config(name)
    assert as_given.scaling.rule == "auto"
    train = as_given.train
    key, size = ("global_tokens", train.global_tokens) if train.global_tokens else ("global_batch", train.global_batch)
    base = scaled(as_given, 1, EPOCH)
    assert (base.factor, base.lr, base.min_lr) == (1.0, as_given.optim.lr, as_given.schedule.min_lr)
    assert base.steps == train.steps or train.epochs
    more = scaled(load_config(name, [f"train.{key}={4 * size}"]), 1, EPOCH)
    assert more.factor == 4.0
    assert more.steps == -(-base.steps // 4)
    assert more.lr == pytest.approx(2 * base.lr)
    assert more.notes == ()
