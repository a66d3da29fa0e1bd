"""The contract of ranks that compute one replica together: sums and exchanges in the middle of forward and backward.

    tensor axis   each layer is spread over the ranks: ``sum``, ``gather``, ``scatter_sum``, dozens of times a pass
    pipe axis     the ranks have layers that follow one another: ``send``, ``receive``

A ``Group`` is for gradients: large, asynchronous, matched by name. An axis is for latency: a call blocks (but for
``send`` and ``receive``), is made on the thread that computes, and is matched by its turn. Sums are made in fp32 (fp64
and integers in their own type), in the order of the ranks, so that all ranks get the same bits.

Every method that is not marked *local* is a collective of the axis.
"""

from abc import abstractmethod

import torch

from hvdtrain.comm.ranks import OneRank, Pending, Ranks


class Axis(Ranks):
    """``backend`` names what carries the bytes: ``shared memory``, ``mpi``, ``nccl``, ``gloo``, ``none``.

    Tensors are contiguous, on the device that the axis was made for; fp32, fp64, bf16, fp16 or integers.
    """

    backend: str
    note = ""  # why it is not a faster one, for the user

    @abstractmethod
    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""

    @abstractmethod
    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' parts, which are of one shape, one after another along ``dim``: a new tensor."""

    @abstractmethod
    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of the sum over the ranks: ``tensor`` is divided along ``dim`` into equal parts."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """A copy of ``root``'s, in place."""

    @abstractmethod
    def send(self, tensor: torch.Tensor, to: int) -> Pending:
        """Start to send ``tensor`` to rank ``to`` (local). It stays as it is until ``wait``."""

    @abstractmethod
    def receive(self, tensor: torch.Tensor, source: int) -> Pending:
        """Start to fill ``tensor`` with what ``source`` sends next (local): k-th receive, k-th send of the pair."""


class LocalAxis(OneRank, Axis):
    """An axis of one rank: a sum over it is the tensor itself."""

    backend = "none"

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        return part

    def scatter_sum(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> Pending:
        raise AssertionError("nobody is there to send to")

    def receive(self, tensor: torch.Tensor, source: int) -> Pending:
        raise AssertionError("nobody is there to receive from")
