"""Are the replicas equal, bit by bit? A fault of memory, of a GPU or of our own makes them drift apart unseen.

Each tensor becomes one 64-bit number on its own device: its bits as integers, each times an odd number that depends on
its place, added up modulo 2**64. Any one element that changes changes it; changes of several cancel out once in 2**32
times at most. What travels is one digest of all these numbers a rank, and only where digests differ the numbers.
"""

import hashlib
import socket
from collections import Counter
from collections.abc import Mapping

import torch

from hvdtrain.comm.ranks import Ranks
from hvdtrain.errors import ReplicaError

_CHUNK = 1 << 20  # elements whose sum is one term, and factors that are kept
_CPU_PIECE = 1 << 17  # of a chunk, what a CPU multiplies at once, in its cache; a GPU takes all of it
_NEXT_CHUNK = 0x2545F4914F6CDD1D  # odd
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaCheck:
    """``check`` all replicas now and then. One for a run; it keeps the factors (8 MiB at most) on the device."""

    def __init__(self, group: Ranks, number: int):
        """group: who compares; number: this rank's among all."""
        self._group, self._number = group, number
        self._factors: dict[torch.device, torch.Tensor] = {}

    def check(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Compare ``tensors`` (any types; the same names on all ranks) with the other ranks' (collective).

        Errors: ReplicaError on all ranks, naming the ranks that differ from most others and the first such tensor.
        """
        if self._group.size == 1:
            return
        hashes = self.hashes(tensors)
        digest = hashlib.blake2b(repr(hashes).encode(), digest_size=16).digest()
        if len(set(self._group.all_gather_object(digest))) == 1:
            return
        found = self._group.all_gather_object((f"rank {self._number} on {socket.gethostname()}", hashes))
        message = difference([hashes for _, hashes in found], [name for name, _ in found])
        raise ReplicaError(f"step {step}: {message}; the last checkpoint is from before")

    @torch.no_grad()
    def hashes(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """64 bits of each tensor: equal where type, order and bits of the elements are (local)."""
        totals: dict[str, torch.Tensor] = {name: self._hash(tensor.detach()) for name, tensor in tensors.items()}
        numbers: dict[str, int] = {}
        for device in dict.fromkeys(total.device for total in totals.values()):  # one copy to the host for each
            names = [name for name, total in totals.items() if total.device == device]
            numbers |= zip(names, torch.stack([totals[name] for name in names]).tolist(), strict=True)
        return {name: numbers[name] for name in tensors}

    def _hash(self, tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        factors = self._factors_on(tensor.device, min(len(bits), _CHUNK))
        at_once = _CPU_PIECE if tensor.device.type == "cpu" else _CHUNK
        for chunk in bits.split(_CHUNK):
            pieces = zip(chunk.split(at_once), factors.split(at_once), strict=False)
            # Integers wrap around, on every device and in every order alike.
            total = total * _NEXT_CHUNK
            for piece, of_piece in pieces:
                total = total + (piece.to(torch.int64) * of_piece[: len(piece)]).sum()
        return total

    def _factors_on(self, device: torch.device, count: int) -> torch.Tensor:
        known = self._factors.get(device)
        if known is None or len(known) < count:
            # splitmix64 of the place, made odd: no pattern of changes that arithmetic likes cancels out.
            places = torch.arange(1, count + 1, dtype=torch.int64, device=device)
            known = self._factors[device] = torch.cat([_mixed(some) | 1 for some in places.split(_CPU_PIECE)])
        return known


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """splitmix64 (Steele, Lea and Flood 2014) of int64 numbers, whose shifts keep the sign: it is masked away."""
    x = numbers * _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def difference(hashes: list[dict[str, int]], ranks: list[str]) -> str:
    """Words for replicas of which some differ: who, from whom, and where first. ranks: what each is called."""
    kinds = [tuple(sorted(one.items())) for one in hashes]
    (most, votes), *rest = Counter(kinds).most_common()
    odd = [rank for rank, kind in enumerate(kinds) if kind != most]
    right = hashes[kinds.index(most)]
    wrong = hashes[odd[0]]
    differing = [name for name in {**right, **wrong} if right.get(name) != wrong.get(name)]
    where = f"first in {differing[0]} ({len(differing)} of {len(right)} tensors)"
    if rest[0][1] == votes:  # no majority
        names = [ranks[rank] for rank in (kinds.index(most), odd[0])]
        return f"the replicas of {' and '.join(names)} differ, and no majority tells which is right; {where}"
    who = ", ".join(ranks[rank] for rank in odd[:4])
    more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
    differ = "differs" if len(odd) == 1 else "differ"
    return f"the replica of {who}{more} {differ} from those of the other {votes} ranks; {where}"
