"""HorovodGroup keeps the contract of Group, for any number of ranks."""

import os
import random
import socket
import time
from itertools import permutations

import pytest
import torch

from hvdtrain.comm.horovod_group import KNOBS, HorovodGroup
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_CRASH, EXIT_USAGE, ConfigError, DataError, RankError
from hvdtrain.machine import cores
from hvdtrain.machine.cores import Topology, take_cores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int32, torch.int64])
def test_sum(group: HorovodGroup, dtype: torch.dtype):
    """Small whole numbers: exact in every dtype. In place, of any shape."""
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3) * (group.rank + 1)
    assert group.all_reduce_sum(tensor, f"sum.{dtype}") is tensor
    ranks = group.size * (group.size + 1) // 2
    assert torch.equal(tensor, torch.arange(6, dtype=dtype).reshape(2, 3) * ranks)


def test_fp64_keeps_its_digits(group: HorovodGroup):
    total = group.all_reduce_sum(torch.tensor([1.0 + 2.0**-40], dtype=torch.float64), "digits")
    assert total.item() == group.size * (1.0 + 2.0**-40)


def test_sums_are_matched_by_name_not_by_order(group: HorovodGroup):
    """As when backward fills the buckets in another order on each rank."""
    own = random.Random(group.rank)
    numbers = own.sample(range(64), 64)
    tensors = {number: torch.full((number + 1,), float(number + group.rank)) for number in range(64)}
    pending = {number: group.all_reduce_sum_async(tensors[number], f"async.{number}") for number in numbers}
    for number in own.sample(numbers, 64):
        pending[number].wait()
        expected = sum(number + rank for rank in range(group.size))
        assert tensors[number].tolist() == [expected] * (number + 1)


@pytest.mark.parametrize("words", [1, 3, 1000])
def test_all_to_all(group: HorovodGroup, words: int):
    """Rank i's row j becomes rank j's row i; in the tensor that was given, every time."""
    received = torch.zeros(group.size, words, dtype=torch.int32)
    place = received.data_ptr()
    for step in range(3):
        rows = torch.arange(group.size, dtype=torch.int32)[:, None] + 100 * group.rank + 1000 * step
        pending = group.all_to_all_async(rows.expand(-1, words).contiguous(), received, f"all_to_all.{words}")
        pending.wait()
        assert pending.done()
        expected = 100 * torch.arange(group.size, dtype=torch.int32)[:, None] + group.rank + 1000 * step
        assert torch.equal(received, expected.expand(-1, words))
        assert received.data_ptr() == place


@pytest.mark.parametrize("words", [1, 3, 1000])
def test_all_gather(group: HorovodGroup, words: int):
    rows = torch.zeros(group.size, words, dtype=torch.int32)
    place = rows.data_ptr()
    for step in range(3):
        row = torch.full((1, words), group.rank + 10 * step, dtype=torch.int32)
        group.all_gather_async(row, rows, f"all_gather.{words}").wait()
        expected = torch.arange(group.size, dtype=torch.int32)[:, None] + 10 * step
        assert torch.equal(rows, expected.expand(-1, words))
        assert rows.data_ptr() == place


def test_done_is_said_only_when_it_is(group: HorovodGroup):
    tensor = torch.ones(3)
    if group.rank == 0:
        pending = group.all_reduce_sum_async(tensor, "done")
        time.sleep(0.05)
        assert pending.done() == (group.size == 1)
    group.barrier()
    if group.rank > 0:
        pending = group.all_reduce_sum_async(tensor, "done")
    pending.wait()
    pending.wait()
    assert pending.done()
    assert tensor.tolist() == [group.size] * 3


def test_knobs_are_in_the_environment(group: HorovodGroup):
    assert {name: os.environ[name] for name in KNOBS} == KNOBS


def test_broadcast_from_every_rank(group: HorovodGroup):
    for root in range(group.size):
        for tensor in (torch.full((3,), float(group.rank)), torch.full((2, 2), group.rank, dtype=torch.int64)):
            group.broadcast(tensor, root, f"broadcast.{tensor.dtype}")
            assert torch.equal(tensor, torch.full_like(tensor, root))


def test_objects_come_in_rank_order(group: HorovodGroup):
    """Of any size, and of another type on each rank: under the names that Horovod gives them they would never meet."""
    mine = [None, "x" * group.rank, {"rank": group.rank}, [1.5] * 1000][group.rank % 4]
    expected = [[None, "x" * rank, {"rank": rank}, [1.5] * 1000][rank % 4] for rank in range(group.size)]
    assert group.all_gather_object(mine) == expected


def test_barrier(group: HorovodGroup):
    time.sleep(0.05 * group.rank)
    came = time.monotonic()  # one clock for all processes of a machine
    group.barrier()
    went = time.monotonic()
    assert went >= max(group.all_gather_object(came))


def test_together_gives_each_rank_its_own_result(group: HorovodGroup):
    assert group.together(lambda: group.rank * 10) == group.rank * 10


def test_an_error_on_one_rank_is_raised_on_all(group: HorovodGroup):
    last = group.size - 1

    def work() -> None:
        if group.rank == last:
            raise DataError("no shards in data/x")

    with pytest.raises(RankError) as caught:
        group.together(work)
    place = f" (on rank {last})" if last else ""
    assert str(caught.value) == f"DataError: no shards in data/x{place}"
    assert (caught.value.exit_code, caught.value.on_all_ranks) == (EXIT_BAD_DATA, True)
    group.barrier()  # nobody is left behind in the failed collective


def test_of_several_errors_the_lowest_rank_speaks(group: HorovodGroup):
    def work() -> None:
        raise ConfigError(f"from {group.rank}") if group.rank % 2 == 0 else DataError(f"from {group.rank}")

    with pytest.raises(RankError) as caught:
        group.together(work)
    assert (str(caught.value), caught.value.exit_code) == ("ConfigError: from 0", EXIT_USAGE)


def test_a_crash_on_one_rank_is_exit_70_on_all_and_shows_its_place_once(group: HorovodGroup, capfd):
    with pytest.raises(RankError) as caught:
        group.together(lambda: 1 // (group.size - 1 - group.rank))
    assert caught.value.exit_code == EXIT_CRASH
    assert "ZeroDivisionError" in str(caught.value)
    assert ("Traceback" in capfd.readouterr().err) == (group.rank == group.size - 1)


def test_agree(group: HorovodGroup):
    group.agree({"seed": 1, "width": [2, 3]}, "the configuration")
    if group.size == 1:
        group.agree(group.rank, "the data")
        return
    with pytest.raises(RankError, match=r"^the data differs between ranks: rank 0 has 0, rank 1 has 1$") as caught:
        group.agree(group.rank, "the data")
    assert caught.value.exit_code == EXIT_USAGE


@pytest.fixture
def cores_of(monkeypatch: pytest.MonkeyPatch):
    """``cores_of(cores, host)``: what this rank shall believe to run on."""

    def believe(cores: set[int], host: str = "n0") -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
        monkeypatch.setattr(cores, "read_topology", Topology)  # each hardware thread a core
        monkeypatch.setattr(socket, "gethostname", lambda: host)

    return believe


def test_ranks_of_a_node_share_its_cores(group: HorovodGroup, cores_of):
    cores_of(set(range(16)))
    assert cores.threads_of_rank(group) == 16 // group.size
    cores_of({0})
    assert cores.threads_of_rank(group) == 1  # crowded, but never none


def test_ranks_with_cores_of_their_own_keep_them(group: HorovodGroup, cores_of):
    cores_of(set(range(8 * group.rank, 8 * group.rank + 8)))
    assert cores.threads_of_rank(group) == 8


def test_ranks_of_other_nodes_take_no_cores(group: HorovodGroup, cores_of):
    cores_of(set(range(16)), host=f"n{group.rank // 2}")
    assert cores.threads_of_rank(group) == 16 // min(2, group.size)


def test_omp_num_threads_is_obeyed(group: HorovodGroup, cores_of, monkeypatch: pytest.MonkeyPatch):
    cores_of(set(range(16)))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cores.threads_of_rank(group) == 3


def test_each_rank_is_bound_to_cores_of_its_own(group: HorovodGroup, cores_of, monkeypatch: pytest.MonkeyPatch):
    """Two NUMA nodes of four cores; nobody really moves."""
    moved: list[set[int]] = []
    cores_of(set(range(8)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: moved.append(set(cpus)))
    for name in ("HVDTRAIN_BIND", *cores.PLACED_BY_USER):
        monkeypatch.delenv(name, raising=False)
    found = take_cores(group, topology=Topology(node_of={cpu: cpu // 4 for cpu in range(8)}))
    if group.size == 1:
        assert (found.threads, found.bound_to, moved) == (8, None, [])
        return
    share = 8 // group.size
    own = set(range(share * group.rank, share * (group.rank + 1)))
    assert (found.threads, found.bound_to, moved) == (share, own, [own])


def test_every_order_of_arrival_ends(group: HorovodGroup):
    """Ranks come to a collective early and late in turn; none overtakes another into the next one."""
    for turn, order in enumerate(permutations(range(min(group.size, 3)))):
        if group.rank < len(order):
            time.sleep(0.005 * order[group.rank])
        assert group.all_gather_object((turn, group.rank)) == [(turn, rank) for rank in range(group.size)]
