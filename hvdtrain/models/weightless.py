"""Models without memory: names, shapes and ties, for what is to be counted or cut before it is made real."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def weightless() -> Iterator[None]:
    """Within: tensors are made on the meta device, and layers do not fill theirs.

    There is nothing to fill. And torch draws numbers on that device by Python functions that load its compiler: 60 MiB
    and a second of every process.
    """
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else named["tensor"]
        return func(*args, **named)
