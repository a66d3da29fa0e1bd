"""Exponential moving average of the weights (Polyak and Juditsky 1992; its use in training: Szegedy et al. 2016, 8).

step        1      2      3      4      5      6          every = 2
weights     w1     w2     w3     w4     w5     w6
average            a2 ----------> a4 ----------> a6        a4 = d a2 + (1 - d) w4

The average is of the fp32 weights that a rank holds, and follows from them: it needs no other rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from hvdtrain.options import Options, option
from hvdtrain.slices import Slice


class EmaOptions(Options):
    decay: float = option(
        0.0, "share of the averaged weights that a step keeps (0.999, 0.9999); 0: weights are not averaged", ge=0, lt=1
    )
    every: int = option(1, "steps between updates of the average; each then keeps decay^every", ge=1)
    warmup: bool = option(
        True, "step t of the average keeps at most (1 + t) / (10 + t): it soon forgets the first weights"
    )


def decay_at(options: EmaOptions, step: int) -> float:
    """What the update after step ``step`` (1 .. of the average) keeps of the average.

    ``every`` costs and saves time but leaves the horizon, 1 / (1 - decay) steps, what it was. Source of the warm-up:
    ``num_updates`` of TensorFlow's tf.train.ExponentialMovingAverage.
    """
    decay = min(options.decay, (1 + step) / (10 + step)) if options.warmup else options.decay
    return decay**options.every


class Ema:
    """Averages of all ``slices`` of a model that are trained, which are fp32. All is local to a rank.

    ``began``: the step whose weights the average began with; warm-up counts from there. Memory: 4 bytes a parameter,
    and in ``swapped`` once more the largest of them.
    """

    def __init__(self, slices: Sequence[Slice], options: EmaOptions):
        assert options.decay > 0, "an average that keeps nothing is off: see make_ema"
        self.options, self.began = options, 0
        self._pieces = [piece for piece in slices if piece.tensor.requires_grad]
        self._weights = [piece.tensor for piece in self._pieces]
        assert all(p.dtype == torch.float32 for p in self._weights), "the fp32 weights are averaged, not copies"
        self._averages = [p.detach().clone() for p in self._weights]
        self._is_swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer's step ``step``: every ``every`` steps one foreach operation; never waits for the GPU."""
        assert not self._is_swapped
        if step % self.options.every == 0 and self._weights:  # a rank may move nothing, see make_optimizer
            keep = decay_at(self.options, step - self.began)
            torch._foreach_lerp_(self._averages, self._weights, 1 - keep)

    @contextmanager
    def swapped(self, changed: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Within, the model has the averaged weights; afterwards its own again, bit for bit, also after an error.

        Values change places and tensors keep their addresses: compiled graphs and flat buffers stay right.
        changed: called after each change of the weights, for whoever holds copies of them.
        """
        self._swap()
        try:
            changed()
            yield
        finally:
            self._swap()
            changed()

    @torch.no_grad()
    def restart(self, step: int) -> None:
        """Begin anew with the model's present weights, which are those after ``step``."""
        assert not self._is_swapped
        if self._weights:
            torch._foreach_copy_(self._averages, self._weights)
        self.began = step

    def averages(self) -> Sequence[Slice]:
        """Of each slice that is trained the average, fp32 like it: the tensor itself, to be saved or written into."""
        assert not self._is_swapped, "what lies here are the model's own weights"
        pairs = zip(self._pieces, self._averages, strict=True)
        return [replace(piece, tensor=average) for piece, average in pairs]

    @torch.no_grad()
    def _swap(self) -> None:
        for weights, average in zip(self._weights, self._averages, strict=True):
            held = weights.clone()
            weights.copy_(average)
            average.copy_(held)
        self._is_swapped = not self._is_swapped


def make_ema(slices: Sequence[Slice], options: EmaOptions) -> Ema | None:
    """The average that a recipe asks for, of the weights as they are now; None where ``decay`` is 0."""
    return Ema(slices, options) if options.decay > 0 else None
