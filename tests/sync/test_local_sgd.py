"""Local SGD: against plain torch by hand, its outer steps, when replicas meet, and what a save leaves behind."""

import math
from collections.abc import Callable

import pytest
import torch
from apart import (
    ADAMW,
    PLAIN_SGD,
    SGD,
    TASK,
    Training,
    assert_equal,
    batch_of,
    by_hand,
    distance,
    without_targets,
)
from threads import ThreadGroup, on_ranks
from tiny import tiny_decoder
from torch import nn

from hvdtrain.config import make_config
from hvdtrain.errors import ConfigError
from hvdtrain.sync import SyncOptions, check_sync
from hvdtrain.sync.local_sgd import LocalSgdOptions

# Of all weights together, fp32: the same numbers are added in another order.
ROUNDING = 1e-6


def local_sgd(**options) -> SyncOptions:
    return SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(**options))


def put_means(models: list[nn.Module]) -> None:
    for parameters in zip(*[model.parameters() for model in models], strict=True):
        mean = torch.stack(list(parameters)).mean(0)
        for parameter in parameters:
            parameter.copy_(mean)


def outer_by_torch(every: int, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
    """What models do at the end of a round: torch's own optimizer, of the way from where it began to the mean."""
    held: list[nn.Parameter] = []
    optimizers: list[torch.optim.Optimizer] = []

    def mixed(step: int, models: list[nn.Module]) -> None:
        if not held:
            held.extend(nn.Parameter(p.detach().clone()) for p in tiny_decoder().parameters())
            optimizers.append(make(held))
        if step % every:
            return
        put_means(models)
        for outer, mean in zip(held, models[0].parameters(), strict=True):
            outer.grad = outer.detach() - mean
        optimizers[0].step()
        for model in models:
            for parameter, outer in zip(model.parameters(), held, strict=True):
                parameter.copy_(outer)

    return mixed


# --- against plain torch -----------------------------------------------------------------------------------------


def test_one_local_step_of_sgd_is_an_all_reduce():
    """Their means are equal then, because SGD with momentum is linear in the gradient, and replicas have equal rows."""

    def work(group: ThreadGroup) -> dict:
        return Training(group, local_sgd(every=1), SGD).to(4).weights()

    expected = on_ranks(2, lambda group: Training(group, SyncOptions(), SGD).to(4).weights())
    for found in on_ranks(2, work):
        assert_equal(found, expected[0], ROUNDING)


@pytest.mark.parametrize("optim", [ADAMW, SGD])
def test_rounds_are_those_of_plain_torch(optim):
    def mixed(step: int, models: list[nn.Module]) -> None:
        if step % 3 == 0:
            put_means(models)

    expected = dict(by_hand(3, 6, optim, mixed)[0].named_parameters())
    for found in on_ranks(
        3, lambda group: Training(group, local_sgd(every=3, optimizer="kept"), optim).to(6).weights()
    ):
        assert_equal(found, expected, ROUNDING)


def test_dilocos_outer_step_is_torchs_nesterov():
    mixed = outer_by_torch(2, lambda held: torch.optim.SGD(held, lr=0.7, momentum=0.9, nesterov=True))
    expected = dict(by_hand(2, 6, SGD, mixed)[0].named_parameters())
    sync = local_sgd(every=2, outer="nesterov", optimizer="kept")
    for found in on_ranks(2, lambda group: Training(group, sync, SGD).to(6).weights()):
        assert_equal(found, expected, ROUNDING)


def test_slow_momentum_is_torchs_momentum():
    mixed = outer_by_torch(2, lambda held: torch.optim.SGD(held, lr=1.0, momentum=0.7))
    expected = dict(by_hand(2, 6, SGD, mixed)[0].named_parameters())
    sync = local_sgd(every=2, outer="slowmo", optimizer="kept")
    for found in on_ranks(2, lambda group: Training(group, sync, SGD).to(6).weights()):
        assert_equal(found, expected, ROUNDING)


def test_slow_momentum_is_in_units_of_the_learning_rate():
    """Wang et al.: u <- m u + d / lr, x <- x - lr u. Where lr is halved, what is left of the last move is too."""

    def work(group: ThreadGroup) -> list[dict]:
        run = Training(group, local_sgd(every=1, outer="slowmo"), PLAIN_SGD)
        seen = [run.weights()]
        for lr in (0.1, 0.0):  # the second step moves nothing by itself
            run.optim = PLAIN_SGD.model_copy(update={"lr": lr or 0.05})
            run.step(batches=None if lr else [without_targets(batch_of(2))])
            seen.append(run.weights())
        run.save()
        return seen

    start, first, second = on_ranks(2, work)[0]
    expected = {name: first[name] + 0.7 * 0.5 * (first[name] - start[name]) for name in start}
    assert_equal(second, expected, ROUNDING)


def test_post_local_sgd_begins_as_all_reduce():
    def work(group: ThreadGroup) -> tuple:
        run = Training(group, local_sgd(every=4, after_share=0.5), steps=8)
        agreed = [run.step() for _ in range(4)]
        half = run.weights()
        agreed += [run.step() for _ in range(4)]
        run.save()
        return [one is not None for one in agreed], half, run.weights()

    def plain(group: ThreadGroup) -> dict:
        run = Training(group, SyncOptions())
        for _ in range(4):
            run.step()
        return run.weights()

    expected = on_ranks(2, plain)[0]
    for told, half, end in on_ranks(2, work):
        assert told == [True] * 4 + [False] * 3 + [True]
        assert_equal(half, expected)
        assert distance(end, expected) > 1e-3


# --- when they meet ----------------------------------------------------------------------------------------------


def test_what_is_told_is_of_all_steps_since_it_was_told_before():
    def work(group: ThreadGroup) -> tuple:
        run = Training(group, local_sgd(every=4))
        sent = len(group.sent)
        told = [run.step(), run.step(), run.step(shown=True), run.step()]
        losses = [float(run.engine._passed.loss)]
        names = group.sent[sent:]
        run.save()
        return told, names, int(run.engine.tokens), losses

    (told, names, tokens, _), *_ = on_ranks(2, work)
    assert [one is not None for one in told] == [False, False, True, True]
    assert (told[2].weight.item(), told[3].weight.item(), tokens) == (3 * 96, 96, 4 * 96)
    assert 3.8 < told[2].loss.item() < 4.1  # a mean over targets: ln 50 is 3.91
    assert names[0] == "hvdtrain.sums"  # two local steps have sent nothing, nor has the third sent more
    assert names[1:] == ["hvdtrain.weights.0", "hvdtrain.states.0", "hvdtrain.sums"]


def test_flags_are_told_at_the_end_of_a_round_or_with_a_save():
    """There a stop changes nothing: elsewhere it would be a mean that those who go on do not make."""

    def work(group: ThreadGroup) -> list[float | None]:
        run = Training(group, local_sgd(every=3))
        flags = []
        for shown, saved in ((True, False), (False, True), (False, False)):
            run.step_number += 1
            run.engine.forward_backward([batch_of(run.step_number)], TASK, run.step_number)
            run.engine.finish(1, shown, saved)
            agreed = run.engine.step(0.01, run.step_number)
            flags.append(agreed and agreed.flags.item())
        run.save()
        return flags

    assert on_ranks(2, work) == [[0.0, 2.0, 2.0]] * 2


def test_h_falls_as_the_root_of_the_loss():
    def work(group: ThreadGroup) -> list[tuple[float, float]]:
        batch = batch_of(1)  # of these rows it learns every one by heart
        run = Training(group, local_sgd(every=8, adaptive=True), steps=200)
        seen = []
        for _ in range(60):
            if (agreed := run.step(batches=[batch])) is not None:
                seen.append((agreed.loss.item(), run.sync.report()["local_steps"]))
        run.save()
        return seen

    (first, _), *rest = seen = on_ranks(2, work)[0]
    assert seen[0][1] == 8
    assert rest[-1][1] < 8
    least = 8
    for loss, length in rest:
        least = min(least, math.ceil(8 * math.sqrt(loss / first)))
        assert length == least


@pytest.mark.parametrize(("kept", "equal"), [("averaged", True), ("kept", False), ("reset", True)])
def test_what_becomes_of_the_optimizers_state(kept: str, equal: bool):
    def work(group: ThreadGroup) -> tuple:
        run = Training(group, local_sgd(every=2, optimizer=kept))
        run.step()
        run.step()
        moments = {name: value["exp_avg"].clone() for name, value in run_states(run).items()}
        saved = run.save()
        return moments, {name: value for name, value in saved.items() if name.startswith("optimizer.exp_avg.")}

    (one, saved_one), (other, saved_other) = on_ranks(2, work)
    assert (len(one) == 0) == (kept == "reset")
    assert all(torch.equal(one[name], other[name]) for name in one) == equal
    assert_equal(saved_one, saved_other)
    if kept == "kept":
        for name in one:
            assert torch.equal(saved_one[f"optimizer.exp_avg.{name}"], (one[name] + other[name]) / 2)


def run_states(run: Training) -> dict:
    named = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return {named[id(parameter)]: state for parameter, state in run.optimizer.state.items() if state}


def test_a_replica_without_targets_waits_for_the_others():
    def work(group: ThreadGroup) -> tuple:
        run = Training(group, local_sgd(every=2))
        batches = [batch_of(1) if group.rank == 0 else without_targets(batch_of(1))]
        start = run.weights()
        run.step(batches=batches)
        alone = run.weights()
        agreed = run.step(batches=batches)
        return start, alone, agreed.weight.item(), agreed.grad_norm.isfinite().item(), run.save()

    (_, _, weight, is_finite, saved), (start, alone, _, _, other) = on_ranks(2, work)
    assert_equal(alone, start)
    assert (weight, is_finite) == (2 * 96, True)
    assert_equal(saved, other)
    assert all(value.isfinite().all() for value in saved.values())


def test_each_replica_clips_its_own_gradient():
    clipped = PLAIN_SGD.model_copy(update={"clip_norm": 1e-3})

    def work(group: ThreadGroup) -> tuple[float, float]:
        run = Training(group, local_sgd(every=8), clipped)
        start = run.weights()
        agreed = run.step(shown=True)
        moved = run.weights()
        run.save()
        way = sum(float((moved[name] - start[name]).square().sum()) for name in start) ** 0.5
        return way, agreed.grad_norm.item()

    for way, norm in on_ranks(2, work):
        assert way == pytest.approx(0.1 * 1e-3, rel=1e-2)
        assert norm > 0.1  # before clipping


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"every": 50}, 40, "every=50 is longer than the run, 40 steps; set it to 40 or less"),
        ({"every": 25, "after_share": 0.5}, 40, "every=25 is longer than the 20 local steps of this run; set it to 20"),
        ({"after_steps": 40}, 40, "after_steps=40 leaves no local step in a run of 40; lower it"),
    ],
)
def test_a_round_longer_than_the_run_is_refused(options: dict, steps: int, message: str):
    with pytest.raises(ConfigError, match=message):
        check_sync(local_sgd(**options), 4, steps)
    check_sync(local_sgd(every=40), 4, 40)


def test_one_beginning_of_local_steps():
    with pytest.raises(ConfigError, match="give after_steps or after_share, not both"):
        make_config({"sync": {"local_sgd": {"after_steps": 4, "after_share": 0.5}}}, "a test")
