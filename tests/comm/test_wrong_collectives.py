"""The doctor's look at collectives names one that gives wrong numbers."""

from typing import Any

import pytest
import torch

from hvdtrain.comm.axis import LocalAxis
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.selftest import check_axis, check_collectives


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


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        ("sum", lambda tensor: tensor + 1, "sum of 1 torch.float32"),
        ("sum", lambda tensor: tensor if tensor.dtype != torch.bfloat16 else tensor * 2, "sum of 1 torch.bfloat16"),
        ("gather", lambda part, dim: part + 1, "gather"),
        ("scatter_sum", lambda tensor, dim: tensor + 1, "scattered sum"),
        ("broadcast", lambda tensor, root: tensor + 1, "broadcast from rank 0"),
    ],
)
def test_a_wrong_one_of_an_axis_is_named(monkeypatch: pytest.MonkeyPatch, method: str, wrong: Any, message: str):
    axis = LocalAxis()
    check_axis(axis)
    monkeypatch.setattr(axis, method, wrong)
    with pytest.raises(AssertionError, match=f"an axis's {message} gives wrong numbers"):
        check_axis(axis)
