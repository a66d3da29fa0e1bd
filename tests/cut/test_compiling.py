"""torch.compile: the same numbers as eager, gradients that leave block by block, a clear word without a compiler."""

import threading

import pytest
import torch
from in_halves import InHalves
from threads import LateGroup, on_ranks
from tiny import random_tokens, tiny_decoder

from hvdtrain.cut.compiling import CompileClock, check_compiler, uncompiled
from hvdtrain.data.batch import Batch
from hvdtrain.errors import ConfigError
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.allreduce import AllReduceOptions
from hvdtrain.tasks.lm import LanguageModel


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch() -> Batch:
    return Batch.from_windows(random_tokens(36).reshape(4, 9))


def one_step(how: str) -> tuple[float, torch.Tensor, list[str]]:
    group = LateGroup()
    sync = SyncOptions(allreduce=AllReduceOptions(bucket_mib=2e-3))
    plan = InHalves(tiny_decoder(layers=2), group, sync, "fp32", 1, how)
    plan.forward_backward([batch(), batch()], LanguageModel(), 1)
    sent = list(group.sent)
    loss = plan.finish(0.0).loss.item()
    scores = plan.evaluate([batch()], LanguageModel())
    assert scores["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert [name for name, _ in plan.model.named_parameters()] == [
        n for n, _ in tiny_decoder(layers=2).named_parameters()
    ]
    return loss, torch.cat([p.grad.flatten() for p in plan.model.parameters()]), sent


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning", "ignore:The .grad attribute")  # inside torch
def test_compiled_is_eager():
    """Loss and gradient within 1e-5: the same sums in another order."""
    loss, gradient, sent = one_step("none")
    clock = CompileClock()
    try:
        for how in ("blocks", "model"):
            compiled_loss, compiled_gradient, compiled_sent = one_step(how)
            assert compiled_loss == pytest.approx(loss, rel=1e-5)
            assert torch.linalg.norm(compiled_gradient - gradient) <= 1e-5 * torch.linalg.norm(gradient)
            assert sorted(compiled_sent) == sorted(sent)  # all in the last backward
            assert clock.seconds > 0
    finally:
        clock.close()


def test_ranks_that_are_threads_leave_the_compiler_on():
    """The second goes into ``uncompiled`` while the first is within: it finds the compiler off, and leaves it so."""
    from torch._dynamo import eval_frame  # loads the compiler, without which nothing is switched

    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with uncompiled():
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with uncompiled():
            second_in.set()
            assert first_out.wait(10)

    on_ranks(2, lambda group: (first, second)[group.rank]())
    assert eval_frame._stance.stance == "default"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="compile=blocks needs a C\\+\\+ compiler: there is no no-such-compiler"):
        check_compiler("blocks", torch.device("cpu"))
    check_compiler("none", torch.device("cpu"))
