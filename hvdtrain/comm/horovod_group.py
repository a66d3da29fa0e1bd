"""Ranks over Horovod: all of them, and by sets; ring all-reduce of gradients by NCCL, MPI or Gloo."""

import os
import pickle
import socket
import time
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hvdtrain.comm.abort import end_all_ranks
from hvdtrain.comm.axes import Axes
from hvdtrain.comm.axis import Axis
from hvdtrain.comm.gloo import check_own_address
from hvdtrain.comm.group import Group, Nodes, Sets, neighbours, set_of
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.messages import Messages, can_serve
from hvdtrain.comm.mpi import start_mpi
from hvdtrain.comm.open_mpi import choose_all_reduce
from hvdtrain.comm.ranks import Pending
from hvdtrain.comm.staged import FromHost
from hvdtrain.comm.waiting import nap
from hvdtrain.comm.world import World, check_sizes, shares_gpus
from hvdtrain.errors import LaunchError, OutputError, RankLostError

# Horovod's settings. It reads them once, when it starts: before a recipe is read, because the ranks need Horovod to
# agree on the recipe. So they are variables of the environment, and what the user has set there wins.
KNOBS = {
    # How many tensors' names it remembers; ranks need not negotiate those again. A bucket has one name, or two on a
    # two-byte wire, and there are fewer buckets than parameters. Its own default is 1024.
    "HOROVOD_CACHE_CAPACITY": "4096",
    # Bytes of tensors that it copies into one buffer, sends, and copies back. Our buckets are such buffers already:
    # with its default of 128 MiB, six buckets of 16 MiB took 2.5 to 3 times as long between two ranks in memory.
    "HOROVOD_FUSION_THRESHOLD": "0",
    # Milliseconds between two looks for tensors to send. A bucket waits at most so long; each look costs some time.
    "HOROVOD_CYCLE_TIME": "1",
    # How long it waits for a missing rank before it ends the job: longer than the watchdog, which names that rank.
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "7260",
}

# How Horovod sums over NCCL: in one ring of all ranks; within nodes, and then between them; the same in two dimensions.
TOPOLOGIES = {"flat": None, "hierarchical": "HOROVOD_HIERARCHICAL_ALLREDUCE", "torus": "HOROVOD_TORUS_ALLREDUCE"}

# A collective that takes little longer than the last rank to come is waited for awake, for some of Horovod's cycles.
_AWAKE_S = 0.02


class _OverHorovod(Group):
    """What a process set of Horovod's can do. world_ranks: its ranks as they are numbered in the world. has_parts:
    whether Horovod looks for new sets.
    """

    # They carry rows of the host's memory; None: Horovod's collectives do.
    _messages: Messages | None = None

    def __init__(self, process_set: Any, world_ranks: Sequence[int], through_host: bool, backend: str, has_parts: bool):
        import horovod.torch as hvd
        from horovod.torch import mpi_ops

        self._hvd, self._ops, self._set, self._world_ranks = hvd, mpi_ops, process_set, world_ranks
        self._has_parts = has_parts
        self.rank, self.size = world_ranks.index(hvd.rank()), len(world_ranks)
        self._through_host, self.backend = through_host, backend

    def all_reduce_sum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        if tensor.is_cuda and self._through_host:
            on_host = tensor.cpu()
            return FromHost(self.all_reduce_sum_async(on_host, name), on_host, tensor)
        self._let_python_run()
        with _ranks_lost():
            handle = self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name=name, process_set=self._set)
        return _PendingCollective(self._hvd, handle)

    def adasum_async(self, tensor: torch.Tensor, name: str) -> Pending:
        self._let_python_run()
        with _ranks_lost():
            handle = self._hvd.allreduce_async_(tensor, op=self._hvd.Adasum, name=name, process_set=self._set)
        return _PendingCollective(self._hvd, handle)

    def all_to_all_async(self, rows: torch.Tensor, received: torch.Tensor, name: str) -> Pending:
        if rows.is_cuda and self._through_host:
            on_host = torch.empty_like(received, device="cpu")
            return FromHost(self.all_to_all_async(rows.cpu(), on_host, name), on_host, received)
        if self._messages is not None and not rows.is_cuda:
            return self._messages.all_to_all_async(rows, received, name)
        # Horovod's public functions make a new tensor for each result. Those below them write into the one that they
        # are given, if it has the right size.
        even, counts = torch.empty(0, dtype=torch.int32), torch.empty(self.size, dtype=torch.int32)
        self._let_python_run()
        return _PendingCollective(self._hvd, self._ops._alltoall_async(rows, even, received, counts, name, self._set))

    def all_gather_async(self, row: torch.Tensor, rows: torch.Tensor, name: str) -> Pending:
        if row.is_cuda and self._through_host:
            on_host = torch.empty_like(rows, device="cpu")
            return FromHost(self.all_gather_async(row.cpu(), on_host, name), on_host, rows)
        if self._messages is not None and not row.is_cuda:
            return self._messages.all_gather_async(row, rows, name)
        self._let_python_run()
        return _PendingCollective(self._hvd, self._ops._allgather_async(row, rows, name, self._set))

    def broadcast(self, tensor: torch.Tensor, root: int, name: str) -> None:
        if tensor.is_cuda and self._through_host:
            on_host = tensor.cpu()
            self.broadcast(on_host, root, name)
            tensor.copy_(on_host)
            return
        self._let_python_run()
        with _ranks_lost():
            handle = self._hvd.broadcast_async_(tensor, self._world_ranks[root], name=name, process_set=self._set)
        _PendingCollective(self._hvd, handle).result(_AWAKE_S)

    def all_gather_object(self, value: Any) -> list[Any]:
        told = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self._gathered(torch.tensor([len(told)]), "hvdtrain.objects.sizes").tolist()
        everything = self._gathered(told, "hvdtrain.objects")
        return [pickle.loads(one.numpy()) for one in everything.split(sizes)]

    def _gathered(self, told: torch.Tensor, name: str) -> torch.Tensor:
        """Of all ranks, one behind another, of any lengths."""
        self._let_python_run()
        with _ranks_lost():
            handle = self._hvd.allgather_async(told, name, self._set)
        return _PendingCollective(self._hvd, handle).result(_AWAKE_S)

    def _let_python_run(self) -> None:
        """Wait for Horovod's table of sets, if need be; to be called before a collective is handed to Horovod (local).

        Where Horovod looks for new sets, all ranks meet in every cycle, and its thread locks the table meanwhile: for
        ever, where a rank is stopped. A collective that is handed over waits for the table with Python's lock in hand,
        and no watchdog could speak. A question by ctypes waits without.
        """
        if self._has_parts:
            self._ops._basics.MPI_LIB_CTYPES.horovod_number_of_process_sets()


class HorovodGroup(_OverHorovod):
    """The group of all ranks. Making one is a collective; there is one per process.

    timeline: whether ``start_timeline`` will be called. Without it Horovod does not start its writer, a thread that
    never sleeps. parts: whether it may be ``split``. Horovod then looks for new sets of ranks in every cycle, all ranks
    together: see ``_let_python_run``.

    topology: one of TOPOLOGIES, where gradients will be summed; None: they will not.

    Errors: LaunchError where Horovod joins another world than the launcher announced, or Gloo would crash here.
    """

    def __init__(self, world: World, timeline: bool = False, parts: bool = False, topology: str | None = None):
        set_knobs(os.environ, topology)
        self._is_recorded = timeline  # Horovod records its own collectives
        if parts:
            os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
        if timeline:
            os.environ["HOROVOD_TIMELINE"] = "DYNAMIC"  # start_timeline needs it
        self._timeline: Path | None = None
        if world.launcher.endswith("--gloo"):
            check_own_address(world)
            self._mpi = None
        else:
            self._mpi = start_mpi(world)  # before hvd.init(): who starts MPI ends it, and Horovod ends before mpi4py
        import horovod.torch as hvd

        if self._mpi is not None and not hvd.mpi_built():
            raise LaunchError(
                f"{world.launcher} starts MPI ranks, but this Horovod was built without MPI; "
                "use `horovodrun --gloo`, or build again with `make env`"
            )
        over_nccl = _over_nccl(hvd)
        if self._mpi is not None and topology is not None and not over_nccl:
            self.all_reduce = choose_all_reduce(self._mpi)
        hvd.init()
        check_sizes(world, hvd.size(), "Horovod")
        backend = "nccl" if over_nccl else "gloo" if self._mpi is None else "mpi"
        super().__init__(hvd.global_process_set, range(hvd.size()), shares_gpus(), backend, parts)
        self._hosts = [] if self._mpi is None else self._mpi.COMM_WORLD.allgather(socket.gethostname())
        self._connect(self)
        self._groups: dict[tuple[int, ...], Group] = {tuple(range(self.size)): self}
        self._axes = Axes(self, self._mpi)

    def split(self, sets: Sets) -> Group:
        own = tuple(set_of(self.rank, sets))
        for ranks in map(tuple, sets):
            if len(ranks) > 1 and ranks not in self._groups:  # Horovod refuses a set that it has
                assert self._has_parts, "it was not made to be split"
                process_set = self._hvd.add_process_set(ranks)
                self._groups[ranks] = LocalGroup()
                if ranks == own:
                    self._groups[ranks] = part = _Part(self, process_set, ranks)
                    self._connect(part)
        return self._groups[own] if own in self._groups else LocalGroup()

    def axis(self, sets: Sets, device: torch.device) -> Axis:
        return self._axes.make(sets, device)

    def _connect(self, group: _OverHorovod) -> None:
        """Let messages carry its rows, where they can (collective over its ranks)."""
        if self._mpi is None or self._is_recorded:
            return
        group._messages = self._between(group._world_ranks)
        if (sets := neighbours(group._world_ranks, self._hosts)) is None or torch.cuda.is_available():
            return
        near, far = (self._between(set_of(self.rank, of_kind)) for of_kind in sets)
        if near is not None and far is not None:
            group.nodes = Nodes(near, far)

    def _between(self, ranks: Sequence[int]) -> Messages | None:
        """Collective over them."""
        if not can_serve(self._mpi, len(ranks)):
            return None
        world = self._mpi.COMM_WORLD
        return Messages(self._mpi, world.Create_group(world.Get_group().Incl(list(ranks))))

    def start_timeline(self, path: Path) -> list[str]:
        self.on_main(lambda: _check_writable(path))
        self._hvd.start_timeline(str(path))
        self._timeline = path
        return [f"timeline in {path}: rank 0's writer never sleeps, so these are no speeds to report"]

    def stop_timeline(self) -> None:
        if self._timeline is not None:
            self._hvd.stop_timeline()  # waits until all is written and the file closed
            self._timeline = None

    def close(self) -> None:
        self._axes.close()
        self.stop_timeline()
        if self._has_parts:
            self.barrier()  # the first rank that leaves ends all sets
        self._hvd.shutdown()

    def abort(self, exit_code: int) -> None:
        """End the whole job now, from one rank (local). Where MPI runs, MPI tells the launcher; elsewhere the launcher
        sees this process's exit code.
        """
        if self._mpi is not None:
            end_all_ranks(self._mpi, exit_code)
        os._exit(exit_code)


class _Part(_OverHorovod):
    """Some of the ranks of ``whole``: a process set of Horovod's, which ends with it."""

    def __init__(self, whole: HorovodGroup, process_set: Any, ranks: Sequence[int]):
        super().__init__(process_set, ranks, whole._through_host, whole.backend, has_parts=True)
        self._whole = whole

    def split(self, sets: Sets) -> Group:
        raise AssertionError("Horovod makes process sets of all ranks only")

    def axis(self, sets: Sets, device: torch.device) -> Axis:
        raise AssertionError("axes are made of all ranks")

    def close(self) -> None:
        pass

    def abort(self, exit_code: int) -> None:
        self._whole.abort(exit_code)


def set_knobs(environment: MutableMapping[str, str], topology: str | None = None) -> None:
    """Put into ``environment`` what the user has not set there (local; before Horovod starts)."""
    asked = None if topology is None else TOPOLOGIES[topology]
    for name, value in {**KNOBS, **({asked: "1"} if asked else {})}.items():
        environment.setdefault(name, value)


class _PendingCollective:
    def __init__(self, hvd: Any, handle: int):
        self._hvd, self._handle = hvd, handle
        self._waited = False

    def done(self) -> bool:
        return self._waited or self._hvd.poll(self._handle)

    def wait(self) -> None:
        self.result()

    def result(self, awake_s: float = 0.0) -> torch.Tensor:
        """What Horovod has made, once. awake_s: how long this rank stays awake before it sleeps between its looks."""
        began = time.monotonic()
        while not self.done():  # Horovod's own wait never sleeps
            if time.monotonic() - began < awake_s:
                os.sched_yield()
            else:
                nap()
        with _ranks_lost():
            made = self._hvd.synchronize(self._handle)
        self._waited = True
        return made


def _check_writable(path: Path) -> None:
    """Errors: OutputError. Horovod itself would only log that it cannot write."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the timeline {path}: {error.strerror}") from None


class _ranks_lost:
    """Turns Horovod's internal error into one that says what happened."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None and kind.__name__ == "HorovodInternalError":
            raise RankLostError(f"lost contact with another rank during a collective ({error})") from None


def _over_nccl(hvd: Any) -> bool:
    """Will gradients of GPUs travel over NCCL?"""
    return not shares_gpus() and torch.cuda.is_available() and bool(hvd.nccl_built())
