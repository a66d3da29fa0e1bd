"""An axis over torch.distributed: NCCL between GPUs, Gloo where ranks have no MPI.

    store    one for all ranks: a server in rank 0's process, at a port of its own choice
    groups   three for each axis: collectives; messages to higher ranks; messages to lower ranks

NCCL runs what a group was given in the order in which it was given: were a message upwards to wait behind one
downwards, and the other way round on the other rank, neither would ever go. Nothing here is torch's default group, so
that a process may have any number of axes, and a user's own groups beside them.

NCCL's work is given from the thread that computes, Horovod's from its own: the two must not be under way at once, which
is for those who start them (sync/ waits with its buckets until the last backward pass is over).

Who sees to it that a message goes on while Python computes? Gloo's own threads; a GPU, by itself.
"""

import pickle
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from hvdtrain.comm.exchange import ExchangeAxis, check
from hvdtrain.comm.ranks import Pending, Ranks
from hvdtrain.errors import RankLostError

_PATIENCE = timedelta(hours=2)  # of a rank that waits: longer than the watchdog, which names who is missing


def open_store(ranks: Ranks) -> dist.TCPStore:
    """Where all ranks find one another (collective)."""
    store = dist.TCPStore(socket.gethostname(), 0, is_master=True, wait_for_workers=False) if ranks.rank == 0 else None
    place = (store.host, store.port) if store else None
    host, port = ranks.all_gather_object(place)[0]
    return store or dist.TCPStore(host, port, is_master=False, wait_for_workers=False)


class TorchAxis(ExchangeAxis):
    """Rank ``rank`` of ``size``, for tensors on ``device``; store: of those ranks alone. Making one is a collective."""

    def __init__(self, backend: Literal["nccl", "gloo"], store: dist.Store, rank: int, size: int, device: torch.device):
        self.backend, self.rank, self.size, self._device = backend, rank, size, device
        make = dist.ProcessGroupGloo if backend == "gloo" else dist.ProcessGroupNCCL
        self._all, self._up, self._down = (
            make(dist.PrefixStore(name, store), rank, size, timeout=_PATIENCE) for name in ("all", "up", "down")
        )

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        check(tensor)
        self._wait(lambda: self._all.broadcast(_bytes(tensor), root), tensor)
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> Pending:
        check(tensor)
        return self._message(lambda group: group.send([_bytes(tensor)], to, 0), self.rank, to)

    def receive(self, tensor: torch.Tensor, source: int) -> Pending:
        check(tensor)
        return self._message(lambda group: group.recv([_bytes(tensor)], source, 0), source, self.rank)

    def all_gather_object(self, value: Any) -> list[Any]:
        told = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(self._device)
        sizes = self.gather(torch.tensor([len(told)], device=self._device), 0).tolist()
        padded = torch.nn.functional.pad(told, (0, max(sizes) - len(told)))
        rows = self.gather(padded, 0).cpu().view(self.size, -1)
        return [pickle.loads(row[:size].numpy()) for row, size in zip(rows, sizes, strict=True)]

    def close(self) -> None:
        self.barrier()  # the first that leaves would cut the others' connections
        for group in (self._all, self._up, self._down):
            group.shutdown()

    def _all_gather(self, row: torch.Tensor, rows: torch.Tensor) -> None:
        self._wait(lambda: self._all._allgather_base(_bytes(rows), _bytes(row)), row)

    def _all_to_all(self, rows: torch.Tensor, received: torch.Tensor) -> None:
        self._wait(lambda: self._all.alltoall_base(_bytes(received), _bytes(rows), [], []), rows)

    def _wait(self, start: Any, tensor: torch.Tensor) -> None:
        with _ranks_lost():
            if tensor.numel():
                start().wait()

    def _message(self, start: Any, source: int, to: int) -> Pending:
        with _ranks_lost():
            kind = _GlooMessage if self.backend == "gloo" else _PendingMessage
            return kind(start(self._up if to > source else self._down))


class _PendingMessage:
    def __init__(self, work: Any):
        self._work, self._is_over = work, False

    def done(self) -> bool:
        return self._is_over or self._work.is_completed()

    def wait(self) -> None:
        if not self._is_over:
            with _ranks_lost():
                self._end()
        self._is_over = True

    def _end(self) -> None:
        self._work.wait()


class _GlooMessage(_PendingMessage):
    """Gloo tells nobody but those who wait: the first who asks starts a thread that does."""

    _waiting: Future | None = None

    def done(self) -> bool:
        if self._waiting is None and not self._is_over:
            self._waiting = Future()
            threading.Thread(target=self._watch, args=(self._waiting,), name="hvdtrain-message", daemon=True).start()
        return self._is_over or (self._waiting is not None and self._waiting.done())

    def _end(self) -> None:
        self._work.wait() if self._waiting is None else self._waiting.result()

    def _watch(self, waiting: Future) -> None:
        try:
            waiting.set_result(self._work.wait())
        except RuntimeError as error:
            waiting.set_exception(error)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor: NCCL and Gloo lack some types."""
    return tensor.detach().view(-1).view(torch.uint8)


@contextmanager
def _ranks_lost() -> Iterator[None]:
    """Turns torch's errors of a connection into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"lost contact with another rank of an axis ({str(error).splitlines()[0]})") from None
