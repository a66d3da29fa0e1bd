"""Which device a rank takes, on machines with and without GPUs (torch is asked through stand-ins)."""

import pytest
import torch
from threads import Scripted

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError
from hvdtrain.machine.device import pick_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """``gpus(4)``: torch sees four; returns the list of those that were chosen."""

    def see(count: int) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return see


def test_no_gpu_is_said(gpus):
    gpus(0)
    device, notes = pick_device("auto", World(), LocalGroup())
    assert (device.type, len(notes), "CPU" in notes[0]) == ("cpu", 1, True)
    assert pick_device("cpu", World(), LocalGroup()) == (torch.device("cpu"), [])
    with pytest.raises(ConfigError, match="device=cuda, but torch finds no GPU"):
        pick_device("cuda", World(), LocalGroup())


def test_a_rank_takes_the_gpu_of_its_place_on_the_node(gpus):
    chosen = gpus(4)
    world = World(rank=6, size=8, local_rank=2, local_size=4, launcher="mpirun")
    assert pick_device("auto", world, Scripted(size=4, backend="nccl")) == (torch.device("cuda", 2), [])
    assert chosen == [2]


@pytest.mark.parametrize(("launcher", "local_size"), [("srun", 4), ("jsrun", 4), ("flux run", 1)])  # 1: not known
def test_a_launcher_may_show_each_rank_its_own_gpu_only(gpus, launcher: str, local_size: int):
    gpus(1)
    world = World(rank=3, size=4, local_rank=3, local_size=local_size, launcher=launcher)
    assert pick_device("auto", world, Scripted(size=4, backend="nccl"))[0] == torch.device("cuda", 0)


def test_gradients_through_host_memory_are_said(gpus):
    gpus(4)
    _, notes = pick_device("cuda", World(0, 4, 0, 4, "mpirun"), Scripted(size=4, backend="mpi"))
    assert len(notes) == 1
    assert "host memory (mpi)" in notes[0]


def test_more_ranks_than_gpus_is_an_error(gpus):
    gpus(2)
    with pytest.raises(ConfigError, match=r"4 ranks on a node with 2 GPUs.*HVDTRAIN_SHARE_GPUS=1"):
        pick_device("auto", World(2, 4, 2, 4, "mpirun"), Scripted(size=4, backend="nccl"))


def test_ranks_share_gpus_where_they_are_told_to(gpus, monkeypatch: pytest.MonkeyPatch):
    gpus(2)
    monkeypatch.setenv("HVDTRAIN_SHARE_GPUS", "1")
    device, notes = pick_device("auto", World(3, 4, 3, 4, "mpirun"), Scripted(size=4, backend="mpi"))
    assert device == torch.device("cuda", 1)
    assert notes == ["gradients travel through host memory (mpi): HVDTRAIN_SHARE_GPUS=1"]
