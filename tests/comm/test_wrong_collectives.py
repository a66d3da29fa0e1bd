"""The doctor's look at collectives names one that gives wrong numbers."""

from typing import Any

import pytest
import torch

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.selftest import check_collectives


def _wrong(tensor: torch.Tensor) -> Any:
    tensor.fill_(7)
    pending = torch.futures.Future()
    pending.set_result(None)
    return pending


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("all_reduce_sum", lambda tensor, name: tensor * 2, "all-reduce of 1 torch.float32"),
        ("all_to_all_async", lambda rows, received, name: _wrong(received), "all-to-all"),
        ("all_gather_async", lambda row, rows, name: _wrong(rows), "all-gather"),
        ("broadcast", lambda tensor, root, name: _wrong(tensor), "broadcast from rank 0"),
        ("all_gather_object", lambda value: [value, value], "all-gather of objects"),
    ],
)
def test_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch, method: str, wrong: Any, message: str):
    group = LocalGroup()
    assert " ok over " in check_collectives(group)
    monkeypatch.setattr(group, method, wrong)
    with pytest.raises(AssertionError, match=f"{message} gives wrong numbers"):
        check_collectives(group)
