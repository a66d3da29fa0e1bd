"""Which steps the guard leaves out, how the learning rate goes down and comes back, when it gives up."""

import math

import pytest
import torch

from hvdtrain.errors import DivergedError
from hvdtrain.optim.guard import Guard, GuardOptions


def _guard(**settings: float) -> Guard:
    return Guard(GuardOptions(policy="skip", **settings), torch.device("cpu"))


def _judge(guard: Guard, loss: float, norm: float, overflowed: bool | None = None) -> bool:
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (loss, norm))
    guard.judge(*numbers, None if overflowed is None else torch.tensor(overflowed))
    return bool(guard.skip)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_left_out(loss: float, norm: float):
    guard = _guard()
    assert not _judge(guard, 3.0, 1.0)
    before = guard.state()
    assert _judge(guard, loss, norm)
    assert guard.state()[:3] == before[:3]  # the averages do not learn from it
    assert guard.check(2) == (1, 1.0)
    assert not _judge(guard, 3.0, 1.0)


def test_an_overflow_of_the_loss_scale_is_no_spike():
    guard = _guard(spike_norm=2.0)
    for _ in range(30):
        _judge(guard, 3.0, 1.0, overflowed=False)
    assert not _judge(guard, 3.0, math.inf, overflowed=True)
    assert _judge(guard, math.nan, math.inf, overflowed=True)
    assert _judge(guard, 3.0, 2.1, overflowed=False)
    assert guard.check(1)[0] == 2


def test_spikes_count_once_the_averages_are_settled():
    guard = _guard(spike_loss=0.5, spike_norm=3.0)
    assert not any(_judge(guard, loss, 1.0) for loss in [9.0, 2.0] * 10)  # 20 steps of any kind
    assert guard.state()[:2] == pytest.approx((5.5, 1.0))
    assert not _judge(guard, 5.9, 2.9)
    assert _judge(guard, 6.1, 1.0)
    assert _judge(guard, 5.0, 3.3)


def test_the_averages_follow():
    guard = _guard()
    for _ in range(400):
        _judge(guard, 4.0, 1.0)
    for _ in range(50):
        _judge(guard, 3.0, 2.0)
    share = 0.98**50
    assert guard.state()[:2] == pytest.approx((3 + share, 2 - share))


def test_backoff_and_recovery():
    guard = _guard(backoff=0.5, recovery=4)
    _judge(guard, math.nan, 1.0)
    _judge(guard, math.nan, 1.0)
    assert guard.factor.item() == 0.25
    for _ in range(4):
        _judge(guard, 3.0, 1.0)
    assert guard.factor.item() == pytest.approx(0.5)
    for _ in range(9):
        _judge(guard, 3.0, 1.0)
    assert guard.factor.item() == 1.0


def test_it_gives_up():
    guard = _guard(stop_after=3)
    for _ in range(2):
        _judge(guard, math.nan, 1.0)
    _judge(guard, 3.0, 1.0)
    for _ in range(2):
        _judge(guard, math.nan, 1.0)
    assert guard.check(5) == (4, 1.0)
    _judge(guard, math.nan, 1.0)
    _judge(guard, 3.0, 1.0)  # a good one before anybody looked
    with pytest.raises(DivergedError, match=r"step 7: 3 steps in a row were skipped.*lower optim\.lr"):
        guard.check(7)


def test_its_state_is_all_of_it():
    one, two = (_guard(spike_norm=1.5, backoff=0.5) for _ in range(2))
    for step in range(40):
        _judge(one, 3.0, 1.0 + step % 3)
    two.load(one.state())
    for step in range(40):
        assert _judge(one, 3.0, 1.0 + step % 4) == _judge(two, 3.0, 1.0 + step % 4)
    assert one.state() == two.state()
