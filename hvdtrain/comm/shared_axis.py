"""An axis whose ranks are on one node: they read one another's memory.

    turn 0   rank 0 writes half 0 of its memory |         | reads half 0 of all ranks
             rank 1 writes half 0 of its memory |  meet   | reads half 0 of all ranks
    turn 1   rank 0 writes half 1               |         | reads half 1
             rank 1                still reads half 0 ... |  writes half 1, reads half 1

Each rank's memory has two halves, used in turn, so that one meeting a turn is enough: whoever writes a half again has
met all ranks since they read it. The memory grows with the tensors, up to a size from which on they go in pieces: where
ranks share cores, a meeting may take a scheduler's time slice, so there should be few.

To meet, a rank counts its turns where all see it, and looks for the counts of the others: for some microseconds at
once, then with naps between, which leave the core to whoever is late. MPI's own barrier never sleeps.

Messages from rank to rank go over MPI, which on one node is memory as well.
"""

import os
import time
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from hvdtrain.comm.ancestors import process_began
from hvdtrain.comm.exchange import SMALL_BYTES, add_in_order, check, equal_parts
from hvdtrain.comm.mpi_axis import MpiAxis
from hvdtrain.errors import RankLostError

_FIRST_BYTES, _MOST_BYTES = 1 << 18, 1 << 24  # of a half
_LOOKS, _NAP_S = 25, 2e-5  # looks by eight
_LOOK_S, _LONG_NAP_S = 1.0, 1e-3  # whether a rank that does not come is there; naps from then on
PLACE = "/dev/shm"  # of Open MPI's shared windows, and of most other MPIs'


class SharedAxis(MpiAxis):
    """The ranks of ``comm``, which are all on one node. Making one is a collective of them.

    first_bytes, most_bytes: of a half of a rank's memory, in the beginning and in the end.
    """

    backend = "shared memory"

    def __init__(self, mpi: ModuleType, comm: Any, first_bytes: int = _FIRST_BYTES, most_bytes: int = _MOST_BYTES):
        super().__init__(mpi, comm)
        self._meeting = _Meeting(mpi, comm)
        self._most_bytes, self._half = most_bytes, 0
        self._open(first_bytes)

    @torch.no_grad()
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        check(tensor)
        self._grow(tensor.nbytes)
        for piece in tensor.view(-1).split(self._piece_bytes // tensor.itemsize):
            memory = self._turn(piece.shape, tensor.dtype)
            memory[self.rank].copy_(piece)
            self._meeting.meet()
            if self.size == 2 or piece.nbytes <= SMALL_BYTES:
                add_in_order(memory, piece)
            else:
                self._share_sum(memory, piece)
        return tensor

    def _share_sum(self, memory: Sequence[torch.Tensor], result: torch.Tensor) -> None:
        """Put the sum of ``memory`` into ``result``: each rank adds a part, and reads those of the others."""
        sums = self._turn(result.shape, result.dtype)
        size = -(-len(result) // self.size)
        parts = [slice(rank * size, (rank + 1) * size) for rank in range(self.size)]
        mine = parts[self.rank]
        add_in_order([row[mine] for row in memory], sums[self.rank][mine])
        self._meeting.meet()
        for part, row in zip(parts, sums, strict=True):
            result[part].copy_(row[part])

    @torch.no_grad()
    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        check(part)
        self._grow(part.nbytes)
        shape = list(part.shape)
        shape[dim] *= self.size
        whole = part.new_empty(shape)
        received = [_flat(one, dim) for one in equal_parts(whole, dim, self.size)]
        for piece in self._pieces(rows := _flat(part, dim), 1):
            memory = self._turn(rows[piece].shape, part.dtype)
            memory[self.rank].copy_(rows[piece])
            self._meeting.meet()
            for row, one in zip(memory, received, strict=True):
                one[piece].copy_(row)
        return whole

    @torch.no_grad()
    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        check(tensor)
        self._grow(tensor.nbytes)
        parts = equal_parts(tensor, dim, self.size)
        result = torch.empty_like(parts[self.rank], memory_format=torch.contiguous_format)
        rows, summed = [_flat(part, dim) for part in parts], _flat(result, dim)
        for piece in self._pieces(summed, self.size):
            memory = self._turn((self.size, *summed[piece].shape), tensor.dtype)
            for rank in range(self.size):
                if rank != self.rank:
                    memory[self.rank][rank].copy_(rows[rank][piece])
            self._meeting.meet()
            sent = [row[self.rank] for row in memory]
            sent[self.rank] = rows[self.rank][piece]
            add_in_order(sent, summed[piece])
        return result

    def close(self) -> None:
        self._shut()
        self._meeting.close()
        super().close()

    def _grow(self, size: int) -> None:
        """Make room for ``size`` bytes, if it may be (collective where there is too little; all ranks ask alike)."""
        if size <= self._piece_bytes or self._piece_bytes >= self._most_bytes:
            return
        larger = min(self._most_bytes, 1 << (size - 1).bit_length())
        if not has_room(self._comm, larger):
            self._most_bytes = self._piece_bytes
            return
        self._shut()
        self._open(larger)

    def _open(self, piece_bytes: int) -> None:
        self._window, memory = _shared(self._mpi, self._comm, 2 * piece_bytes)
        whole = [torch.frombuffer(one, dtype=torch.uint8) for one in memory]
        self._halves = [[one[half * piece_bytes :][:piece_bytes] for one in whole] for half in (0, 1)]
        self._piece_bytes = piece_bytes

    def _shut(self) -> None:
        self._halves = []
        self._window.Free()

    def _turn(self, shape: Sequence[int], dtype: torch.dtype) -> list[torch.Tensor]:
        """The half that is free now: every rank's memory, as a tensor of a piece."""
        self._half = 1 - self._half
        size = torch.Size(shape).numel() * dtype.itemsize
        return [memory[:size].view(dtype).view(shape) for memory in self._halves[self._half]]

    def _pieces(self, rows: torch.Tensor, count: int) -> Iterator[tuple[slice, slice]]:
        """Where the pieces of ``rows`` [n, m] lie, ``count`` of which fit into a half."""
        room, (height, width) = self._piece_bytes // (count * rows.itemsize), rows.shape
        rows_of_piece, columns = max(1, room // max(1, width)), min(room, width)
        for row in range(0, height, rows_of_piece):
            for column in range(0, width, max(1, columns)):
                yield slice(row, row + rows_of_piece), slice(column, column + columns)


class _Meeting:
    """Where all ranks see how often each of them has come. Making one is a collective."""

    def __init__(self, mpi: ModuleType, comm: Any):
        self._window, memory = _shared(mpi, comm, 8)
        self._counts = [memoryview(one).cast("q") for one in memory]
        self._mine = self._counts[comm.Get_rank()]
        self._mine[0] = 0
        self._processes = comm.allgather((os.getpid(), process_began(os.getpid())))
        # In containers of their own they do not see one another.
        seen = all(process_began(pid) == began for pid, began in self._processes)
        self._sees_processes = all(comm.allgather(seen))

    def meet(self) -> None:
        """What each rank has written before is what all read afterwards."""
        self._window.Sync()
        turn = self._mine[0] + 1
        self._mine[0] = turn
        for rank, count in enumerate(self._counts):
            if count[0] < turn:
                self._wait_for(rank, turn)
        self._window.Sync()

    def _wait_for(self, rank: int, turn: int) -> None:
        """Errors: RankLostError where its process has ended: a launcher that has ended too would tell nobody."""
        count = self._counts[rank]
        for _ in range(_LOOKS):
            for _ in range(8):
                if count[0] >= turn:
                    return
            os.sched_yield()
        nap_s, looked = _NAP_S, time.monotonic()
        while count[0] < turn:
            time.sleep(nap_s)
            if time.monotonic() - looked > _LOOK_S:
                looked, nap_s, (pid, began) = time.monotonic(), _LONG_NAP_S, self._processes[rank]
                if self._sees_processes and process_began(pid) != began and count[0] < turn:
                    raise RankLostError(f"rank {rank} of the ranks that share memory (process {pid}) has ended")

    def close(self) -> None:
        self._counts, self._mine = [], memoryview(b"")
        self._window.Free()


def has_room(comm: Any, piece_bytes: int = _FIRST_BYTES) -> bool:
    """Is there memory for such halves of all ranks of a node? (collective) Open MPI tells its first rank alone."""
    there = os.statvfs(PLACE) if os.path.isdir(PLACE) else None
    needed = 2 * piece_bytes * comm.Get_size()
    return comm.bcast(there is None or there.f_bavail * there.f_frsize > needed)


def window_bytes(largest: int) -> int:
    """Of a rank's memory in the end, where tensors have up to ``largest`` bytes."""
    return 2 * min(_MOST_BYTES, max(_FIRST_BYTES, 1 << (largest - 1).bit_length()))


def _shared(mpi: ModuleType, comm: Any, size: int) -> tuple[Any, list[Any]]:
    """A window of ``size`` bytes of each rank, and every rank's memory in it."""
    window = mpi.Win.Allocate_shared(size, comm=comm)
    return window, [window.Shared_query(rank)[0] for rank in range(comm.Get_size())]


def _flat(part: torch.Tensor, dim: int) -> torch.Tensor:
    """A part along ``dim`` of a contiguous tensor, as a view of two dims: what is before ``dim``, and the rest."""
    dim %= part.dim()
    before = part.shape[:dim].numel()
    return part.view(before, -1) if part.numel() else part.new_empty(0, 0)
