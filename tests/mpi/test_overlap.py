"""Gradients travel while backward still runs, and only when they are complete."""

import pytest
import torch
from replicas import TINY_BUCKETS, global_batch, make_plan, share

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.ranks import Pending
from hvdtrain.data.batch import Batch
from hvdtrain.tasks.lm import LanguageModel
from hvdtrain.tasks.task import LossSum


class _Diary(LanguageModel):
    """Writes down, in order: ``forward`` of each microbatch, ``send`` of each bucket, ``backward``'s way to block 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, group: HorovodGroup, model: torch.nn.Module):
        super().__init__()
        self.events: list[str] = []
        send = group.all_reduce_sum_async

        def all_reduce_sum_async(tensor: torch.Tensor, name: str) -> Pending:
            self.events.append("send" if ".gradients." in name else name)
            return send(tensor, name)

        monkeypatch.setattr(group, "all_reduce_sum_async", all_reduce_sum_async)
        model.blocks[0].register_full_backward_hook(lambda *_: self.events.append("backward"))

    def loss(self, model: torch.nn.Module, output: torch.Tensor, batch: Batch) -> LossSum:
        self.events.append("forward")
        return super().loss(model, output, batch)


@pytest.mark.parametrize("passes", [1, 3])
def test_most_buckets_leave_before_backward_reaches_the_first_block(group: HorovodGroup, monkeypatch, passes: int):
    model, plan = make_plan(group, TINY_BUCKETS)
    diary = _Diary(monkeypatch, group, model)
    plan.forward_backward(share(global_batch(), group, passes), diary, step=1)
    during = list(diary.events)
    plan.finish(max_norm=1.0)
    buckets = len(list(model.parameters()))  # so tiny that each parameter has its own
    assert diary.events.count("send") == buckets
    # None before the last microbatch: until then a gradient is not complete.
    last_forward = max(number for number, event in enumerate(during) if event == "forward")
    assert "send" not in during[:last_forward]
    assert during.count("forward") == passes
    # All but the last of block 0's own and the embeddings' have left when backward comes out of block 0.
    way_out = max(number for number, event in enumerate(during) if event == "backward")
    assert during[:way_out].count("send") > buckets / 2
    # And those of a full backward all leave before the loop goes on: finish() has only the sums to send.
    assert diary.events[len(during) :] == ["hvdtrain.sums"]
