"""Which random numbers dropout draws: those of (seed, place in the model), never of how often somebody drew before.

    model.draws.begin(seed, device)      a microbatch: seed of (run, step, replica, microbatch)
    embedding             place 0        torch's generator is seeded anew before each place
    block 0  attention    place 1, 0
             feed-forward place 1, 1
    ...

So a stage of a pipeline draws what the whole model draws there, in whatever order passes come, and a block that is
computed again for backward draws the same numbers again. A compiled block is one place; a model that is compiled as a
whole is one, too.

Ranks that share each layer draw alike, but for what is one's own (from ``fork`` to ``join`` or the next place).
"""

import torch

END = -1  # place of what comes behind the blocks

_MASK = (1 << 64) - 1


class Draws:
    """One for a model. ``seed``: of the present microbatch; None: nobody has begun one, and nothing is seeded.

    ``part``: which of the ranks this is that share each layer.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self._device = torch.device("cpu")
        self._place: tuple[int, ...] = ()
        self._turn = 0  # how often numbers have forked or joined at this place
        self.part = 0

    def begin(self, seed: int, device: torch.device) -> None:
        """What follows is a microbatch of this seed, on this device."""
        self.seed, self._device = seed, device

    def at(self, *place: int) -> None:
        """The next numbers are those of ``place``. Within what is compiled nothing is seeded."""
        if not torch.compiler.is_compiling():
            self._place, self._turn = place, 0
            self._seed_with()

    def fork(self) -> None:
        """The next numbers are this part's own."""
        if not torch.compiler.is_compiling():
            self._turn += 1
            self._seed_with(self._turn, self.part + 1)

    def join(self) -> None:
        """The next numbers are the same again on all parts."""
        if not torch.compiler.is_compiling():
            self._turn += 1
            self._seed_with(self._turn, 0)

    def _seed_with(self, *more: int) -> None:
        if self.seed is not None:
            # One generator, not torch.manual_seed: that seeds those of all devices, in 200 times the time.
            generator_of(self._device).manual_seed(mixed(self.seed, *self._place, *more))


def generator_of(device: torch.device) -> torch.Generator:
    """Which dropout on ``device`` draws from."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def mixed(seed: int, *numbers: int) -> int:
    """A seed of ``seed`` and ``numbers``, in their order: splitmix64's step (Steele, Lea and Flood 2014) for each."""
    for number in numbers:
        seed = (seed + 0x9E3779B97F4A7C15 * (number + 2)) & _MASK
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & _MASK
        seed ^= seed >> 31
    return seed >> 1
