"""Newton-Schulz steps over ranks, for Muon: each matrix is made by one rank, its owner, for all that hold pieces of it.

all ranks hold all      rank 0 makes A, C        rank 1 makes B            one all-gather of what was made
pieces (tensor axis,    rank 0  [A top][B top]   to owners  [A    ] [B    ]   one all-to-all there,
ZeRO, servers)          rank 1  [A end][B end]   back       [A top] [B top]   one back

Whoever holds a piece gets the same bits of it from the owner, so that replicas stay equal also where their processors,
or threads, multiply in other orders.
"""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import Mesh
from hvdtrain.optim.muon import Matrices, MuonOptions, NewtonSchulz, WholeMatrices, Write
from hvdtrain.optim.runs import Room, in_runs
from hvdtrain.slices import Rect, Slice, tile
from hvdtrain.sync.apart import ApartSync
from hvdtrain.sync.sync import Sync


class Block(NamedTuple):
    """What a rank holds of a matrix. ``matrix``: its number; ``place``: in the whole tensor."""

    matrix: int
    place: Rect


class Routes:
    """Who makes which matrix, and who sends what to whom: the same on all ranks.

    matrices: of each (tensor, place in it). held: of each rank its rectangles of each tensor.
    """

    def __init__(self, matrices: Sequence[tuple[str, Rect]], held: Sequence[Mapping[str, Sequence[Rect]]]):
        self.ranks = range(len(held))
        self.held = [
            [
                Block(number, common)
                for number, (name, place) in enumerate(matrices)
                for rect in of_rank.get(name, ())
                if (common := rect.common(place)) is not None
            ]
            for of_rank in held
        ]
        self.is_alike = all(blocks == self.held[0] for blocks in self.held)
        holders: dict[int, dict[Rect, list[int]]] = defaultdict(lambda: defaultdict(list))
        for rank, blocks in enumerate(self.held):
            for block in blocks:
                holders[block.matrix][block.place].append(rank)
        for number, (name, place) in enumerate(matrices):
            assert tile(list(holders[number]), place), f"what ranks hold of {name} has a gap or an overlap"
        self.owners = self._owners([place for _, place in matrices], holders)
        # [from][to]: what an owner has not, by the holder that is nearest to it; and what it makes, to all holders.
        self.gathered: list[list[list[Block]]] = [[[] for _ in self.ranks] for _ in self.ranks]
        self.returned: list[list[list[Block]]] = [[[] for _ in self.ranks] for _ in self.ranks]
        for number, of_matrix in holders.items():
            owner = self.owners[number]
            for place, ranks in of_matrix.items():
                if owner not in ranks:
                    self.gathered[min(ranks, key=lambda rank: abs(rank - owner))][owner].append(Block(number, place))
                for rank in ranks:
                    if rank != owner or self.is_alike:
                        self.returned[owner][rank].append(Block(number, place))

    def _owners(self, places: Sequence[Rect], holders: Mapping[int, Mapping[Rect, Sequence[int]]]) -> Mapping[int, int]:
        """Matrix -> rank: one that has most of it; among those, who has least to do. The costly ones first."""
        owners: dict[int, int] = {}
        load = [0 for _ in self.ranks]
        for number in sorted(range(len(places)), key=lambda number: -_cost(places[number].shape)):
            has: dict[int, int] = defaultdict(int)
            for place, ranks in holders[number].items():
                for rank in ranks:
                    has[rank] += place.numel
            owner = min(has, key=lambda rank: (-has[rank], load[rank], rank))
            owners[number] = owner
            load[owner] += _cost(places[number].shape)
        return owners


class SpreadMatrices:
    """See ``Matrices``: the ranks of ``group`` hold the same matrices, or pieces. Making and calling it are collective.

    pieces: what this rank's optimizer moves of them; parts: by a tensor's name the rows of the matrices in it.
    """

    def __init__(
        self, pieces: Sequence[Slice], parts: Mapping[str, Sequence[int]], group: Group, newton_schulz: NewtonSchulz,
        device: torch.device,
    ):  # fmt: skip
        self._group, self._newton_schulz, self._device = group, newton_schulz, device
        held: dict[str, list[Rect]] = defaultdict(list)
        for piece in pieces:
            held[piece.name] += piece.places
        shapes = {piece.name: tuple(piece.whole) for piece in pieces}
        everyone = group.all_gather_object((dict(held), shapes))
        shapes = {name: shape for _, of_rank in everyone for name, shape in of_rank.items()}
        self._matrices = [
            (name, Rect((begin, 0), (rows, shapes[name][1])))
            for name in sorted(shapes)
            for begin, rows in zip(accumulate(parts[name], initial=0), parts[name], strict=False)
        ]
        self.routes = Routes(self._matrices, [of_rank for of_rank, _ in everyone])
        self._pieces = {id(piece.tensor): piece for piece in pieces}
        self._tensors = [piece.tensor for piece in pieces]
        self._numbers: dict[str, list[int]] = defaultdict(list)  # of the matrices in a tensor
        for number, (name, _) in enumerate(self._matrices):
            self._numbers[name].append(number)
        self._own = [number for number, owner in self.routes.owners.items() if owner == group.rank]
        self._room = Room()

    def has(self, weight: torch.Tensor) -> bool:
        return id(weight) in self._pieces

    def updates(
        self, weights: list[torch.Tensor], write: Write
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        whole, dtype = self._gather(write), self._newton_schulz.dtype
        made = {number: torch.empty_like(matrix, dtype=dtype) for number, matrix in whole.items()}
        self._newton_schulz(list(whole.values()), list(made.values()))
        del whole

        def own(block: Block) -> torch.Tensor:
            return self._cut(made[block.matrix], block)

        found = self._exchange(self.routes.returned, own, dtype, "made")
        if not self.routes.is_alike:
            found |= {block: own(block) for block in self._mine if block.matrix in made}
        for run in in_runs(weights):
            updates = self._room.like(run)
            for weight, update in zip(run, updates, strict=True):
                for block, view in self._views(self._pieces[id(weight)], update):
                    view.copy_(found[block])
            yield run, updates

    @property
    def _mine(self) -> Sequence[Block]:
        return self.routes.held[self._group.rank]

    def _gather(self, write: Write) -> dict[int, torch.Tensor]:
        """The matrices that this rank makes, whole (collective)."""
        rank = self._group.rank
        needed = {block for to in self.routes.gathered[rank] for block in to}
        needed |= {block for block in self._mine if block.matrix in self._own}
        written: dict[Block, torch.Tensor] = {}
        for weight in self._tensors:
            pairs = self._views(self._pieces[id(weight)], weight.detach())
            if not any(block in needed for block, _ in pairs):
                continue
            update = torch.empty_like(weight)
            write([weight], [update])
            pairs = self._views(self._pieces[id(weight)], update)
            kept = [(block, view) for block, view in pairs if block in needed]
            # A view would keep the memory of them all.
            written |= kept if len(kept) == len(pairs) else [(block, view.clone()) for block, view in kept]
        blocks = {**written, **self._exchange(self.routes.gathered, written.__getitem__, torch.float32, "pieces")}
        whole = {}
        for number in self._own:
            place = self._matrices[number][1]
            if Block(number, place) in blocks:
                whole[number] = blocks[Block(number, place)]
            else:
                whole[number] = torch.empty(place.shape, device=self._device)
        for block, tensor in blocks.items():
            if block.matrix in whole and tensor is not whole[block.matrix]:
                self._cut(whole[block.matrix], block).copy_(tensor)
        return whole

    def _exchange(
        self,
        sent: Sequence[Sequence[Sequence[Block]]],
        tensor_of: Callable[[Block], torch.Tensor],
        dtype: torch.dtype,
        name: str,
    ) -> dict[Block, torch.Tensor]:
        """What others send this rank (collective). sent: [from][to]."""
        rank, unit = self._group.rank, 4 // dtype.itemsize  # they travel as integers of four bytes
        most = max(sum(block.place.numel for block in blocks) for of_rank in sent for blocks in of_rank)
        if not most:
            return {}
        most = -(-most // unit) * unit
        rows = torch.empty(1 if self.routes.is_alike else self._group.size, most, dtype=dtype, device=self._device)
        for row, blocks in zip(rows, sent[rank], strict=False):
            for block, place in _places(row, blocks):
                place.copy_(tensor_of(block))
        received = torch.empty(self._group.size, most, dtype=dtype, device=self._device)
        integers = rows.view(torch.int32), received.view(torch.int32)
        if self.routes.is_alike:
            self._group.all_gather_async(*integers, f"hvdtrain.matrices.{name}").wait()
        else:
            self._group.all_to_all_async(*integers, f"hvdtrain.matrices.{name}").wait()
        return dict(pair for of_rank, row in zip(sent, received, strict=True) for pair in _places(row, of_rank[rank]))

    def _cut(self, matrix: torch.Tensor, block: Block) -> torch.Tensor:
        return matrix[block.place.index_in(self._matrices[block.matrix][1])]

    def _views(self, piece: Slice, tensor: torch.Tensor) -> list[tuple[Block, torch.Tensor]]:
        """The blocks of matrices in a tensor of this piece's shape, as views of it."""
        places = piece.places
        rectangles = [tensor] if len(places) == 1 else tensor.split([place.shape[0] for place in places])
        return [
            (Block(number, common), view[common.index_in(place)])
            for place, view in zip(places, rectangles, strict=True)
            for number in self._numbers[piece.name]
            if (common := place.common(self._matrices[number][1])) is not None
        ]


def bytes_at_peak(numbers: int, ranks: int, is_alike: bool, narrow: bool) -> int:
    """That ``SpreadMatrices.updates`` takes at once (local), beside Newton-Schulz steps. numbers: of matrices that a
    rank holds, or of its pieces.

    is_alike: all ``ranks`` hold all. narrow: are products in 16 bits?
    """
    of_number = 2 if narrow else 4
    if not is_alike:  # written, sent or received, and put together
        return 3 * 4 * numbers
    own = -(-numbers // ranks)
    # What was written has gone when all arrives, but in pieces: none is as large as what arrives.
    return 4 * own + of_number * (2 * own + numbers)


def is_narrow(options: MuonOptions, fast: bool) -> bool:
    """Are products in 16 bits? fast: are they faster so, on this device?"""
    return fast if options.precision == "auto" else options.precision == "bf16"


def make_matrices(
    sync: Sync, parts: Mapping[str, Sequence[int]], options: MuonOptions, mesh: Mesh, device: torch.device, fast: bool
) -> tuple[Matrices, list[str]]:
    """Of what ``sync`` moves; and what has to be said about it (collective).

    parts: see ``SpreadMatrices``. fast: are products in bf16 faster on this rank's device?
    """
    pieces = [piece for piece in sync.moves if piece.name in parts]
    group = mesh.replica
    if mesh.tensor.size > 1:
        group = mesh.holders(frozenset({mesh.pipe.rank}), all_parts=True)
    narrow = is_narrow(options, all(group.all_gather_object(fast)))
    newton_schulz = NewtonSchulz(torch.bfloat16 if narrow else torch.float32, options.scale)
    whole = WholeMatrices({piece.tensor: parts[piece.name] for piece in pieces if piece.is_whole}, newton_schulz)
    if isinstance(sync, ApartSync) or group.size == 1:
        return whole, []
    spread = SpreadMatrices(pieces, parts, group, newton_schulz, device)
    if not spread.routes.is_alike or options.share == "always":
        return spread, []
    if options.share == "never":
        return whole, []
    return _faster(whole, spread, [piece.tensor for piece in pieces], group)


def _faster(whole: Matrices, spread: Matrices, weights: list[torch.Tensor], group: Group) -> tuple[Matrices, list[str]]:
    """Whether ranks share the work, by a trial of both (collective)."""
    times, digests = [], []
    for matrices in (whole, spread):
        least = math.inf
        for _ in range(2):  # the first makes kernels and room
            group.barrier()
            started, digest = time.perf_counter(), hashlib.blake2b()
            for _, updates in matrices.updates(weights, _write_trial):
                for update in updates:
                    digest.update(update.cpu().numpy().tobytes())
            least = min(least, time.perf_counter() - started)
        times.append(least)
        digests.append(digest.digest())
    told = group.all_gather_object((times, digests))
    alone_s, shared_s = (max(of_rank[way] for of_rank, _ in told) for way in range(2))
    are_alike = all(digests[0] == digests[1] for _, digests in told)
    said = f"Newton-Schulz steps of all matrices: {1e3 * alone_s:.1f} ms on each rank, {1e3 * shared_s:.1f} ms shared"
    if not are_alike:
        return spread, [f"{said}; the ranks share them, because they would not all get the same bits"]
    return (spread, [f"{said}; the ranks share them"]) if shared_s < alone_s else (whole, [f"{said}; each makes all"])


def _write_trial(weights: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    """Numbers that are alike on all ranks."""
    for tensor in into:
        generator = torch.Generator(tensor.device).manual_seed(tensor.numel())
        tensor.uniform_(-1, 1, generator=generator)


def _places(row: torch.Tensor, blocks: Sequence[Block]) -> Iterator[tuple[Block, torch.Tensor]]:
    """Where in a row each of several blocks lies, one behind another."""
    begin = 0
    for block in blocks:
        yield block, row[begin : begin + block.place.numel].view(block.place.shape)
        begin += block.place.numel


def _cost(shape: Sequence[int]) -> int:
    """Multiplications of a Newton-Schulz step."""
    least, most = sorted(shape)
    return least * least * (2 * most + least)
