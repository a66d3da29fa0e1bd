"""Gradients that are not kept: added up in a bucket only until it has left, in every microbatch.

backward    [layer 4][layer 3][layer 2][layer 1]  [layer 4][layer 3]        of the first, of the second microbatch
buckets     [bucket 0       ]                                               filled, sent, and its room used again
                              [bucket 1        ]
                                                  [bucket 0       ]
"""

from collections.abc import Callable, Sequence

import torch

from hvdtrain.slices import Slice
from hvdtrain.sync.buckets import Run, arrived_twice
from hvdtrain.sync.scatter import Room


class PassingGradients:
    """The gradients of ``slices``, taken from ``grad`` as soon as backward has left them there.

    computing, uses: see ``Buckets``. offer: called with a run's number when it has one more pass's gradients of all its
    members; observe: before it, with what the first pass has given. One step: ``begin(passes)``, a backward for each.
    """

    def __init__(
        self,
        slices: Sequence[Slice],
        computing: Sequence[torch.Tensor],
        runs: Sequence[Run],
        room: Room,
        offer: Callable[[int], None],
        observe: Callable[[Run, torch.Tensor], None],
        uses: Sequence[int] | None = None,
    ):
        self._runs, self._room, self._computing = runs, room, computing
        self._offer, self._observe = offer, observe
        self._uses = uses or [1] * len(slices)
        self._flats: list[tuple[torch.Tensor, list[torch.Tensor]] | None] = [None] * len(runs)
        self.begin(0)
        places = {
            member: (number, index) for number, run in enumerate(runs) for index, (member, _) in enumerate(run.members)
        }
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(number, *places[number]))
            for number, parameter in enumerate(computing)
        ]

    def begin(self, passes: int) -> None:
        """A step of ``passes`` backwards (local)."""
        for parameter in self._computing:
            parameter.grad = None
        self._passes, self._is_mixed = passes, False
        self._seen = [0] * len(self._uses)
        self._offered = [0] * len(self._runs)
        self._missing = [self._due(run, 1) for run in self._runs]

    def take(self, number: int) -> torch.Tensor:
        """What a run has of gradients that nobody took before: flat; it goes back to ``room`` (local)."""
        flat, _ = self._opened(number)
        self._flats[number] = None
        return flat

    @property
    def used(self) -> torch.Tensor:
        """Of each parameter: has it had a gradient? bool, on the host."""
        return torch.tensor([seen > 0 for seen in self._seen])

    @property
    def is_complete(self) -> bool:
        """Has every pass given every parameter a gradient, and nothing come between those of one?"""
        due = all(seen == self._passes * uses for seen, uses in zip(self._seen, self._uses, strict=True))
        return due and not self._is_mixed

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _opened(self, number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A run's flat tensor, and its members' places there."""
        if (opened := self._flats[number]) is None:
            run = self._runs[number]
            first = run.members[0][1]
            flat = self._room.take((run.length,), first.dtype, first.device).zero_()
            opened = self._flats[number] = flat, run.views(flat)
        return opened

    def _due(self, run: Run, passes: int) -> int:
        """How many gradients are missing until ``passes`` passes have given all of a run's."""
        return sum(max(0, passes * self._uses[member] - self._seen[member]) for member, _ in run.members)

    def _hook(self, member: int, number: int, index: int) -> Callable[[torch.Tensor], None]:
        uses = self._uses[member]

        def gradient_is_there(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            _, views = self._opened(number)
            views[index].add_(parameter.grad)
            parameter.grad = None
            self._seen[member] += 1
            if self._seen[member] > self._passes * uses:
                raise arrived_twice()
            if self._seen[member] > (self._offered[number] + 1) * uses:
                self._is_mixed = True  # another of the run's members had no gradient in the pass before
                return
            self._missing[number] -= 1
            while self._missing[number] == 0 and self._offered[number] < self._passes:
                if self._offered[number] == 0:
                    self._observe(self._runs[number], self._opened(number)[0])
                self._offered[number] += 1
                self._missing[number] = self._due(self._runs[number], self._offered[number] + 1)
                self._offer(number)

        return gradient_is_there
