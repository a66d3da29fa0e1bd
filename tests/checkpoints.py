"""What the tests write into checkpoints and find in them."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from hvdtrain.checkpoint import reader
from hvdtrain.checkpoint.reader import Checkpoint
from hvdtrain.checkpoint.state import run_state
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.optim.ema import Ema
from hvdtrain.slices import Slice, whole_slice, whole_slices


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, ema: Ema | None = None) -> list[Slice]:
    """All that is saved of a model that every rank holds whole."""
    return run_state(whole_slices(model, LocalGroup()), optimizer, ema)


def averages_of(ema: Ema) -> dict[str, torch.Tensor]:
    """By the names of the parameters; the tensors themselves."""
    return {average.name: average.tensor for average in ema.averages()}


def slices_of(tensors: Mapping[str, torch.Tensor]) -> list[Slice]:
    """Whole tensors of one process, under these very names."""
    return [whole_slice(name, tensor, LocalGroup()) for name, tensor in tensors.items()]


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """What must be equal on all replicas: parameters by name and, where given, the optimizer's state of each."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        tensors |= {f"optimizer.{key}.{name}": v for key, v in state.items() if isinstance(v, torch.Tensor)}
    return tensors


def copies_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and what the optimizer keeps of them, as they are now."""
    found = dict(model.named_parameters())
    for name, parameter in model.named_parameters():
        found |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_equal(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> None:
    """Bit by bit, types included."""
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []
    assert [name for name in some if some[name].dtype != others[name].dtype] == []


def tensors_in(folder: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint whose names begin so."""
    saved = Checkpoint(folder)
    return {name: saved.read(name) for name in saved if name.startswith(prefix)}


def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str, str]]:
    """From now on, of each (part, key, index) that is read, how many bytes that took, all times together."""
    counted: Counter[tuple[str, str, str]] = Counter()

    class Lazy:
        def __init__(self, path: Path, key: str, lazy: Any):
            self.path, self.key, self.lazy = path, key, lazy
            self.get_shape, self.get_dtype = lazy.get_shape, lazy.get_dtype

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.lazy[index]
            counted[self.path.name, self.key, str(index)] += tensor.numel() * tensor.element_size()
            return tensor

    class File:
        def __init__(self, path: Path, **how: str):
            self.path, self.file = path, safe_open(path, **how)
            self.keys = self.file.keys

        def get_slice(self, key: str) -> Lazy:
            return Lazy(self.path, key, self.file.get_slice(key))

    monkeypatch.setattr(reader, "safe_open", File)
    return counted
