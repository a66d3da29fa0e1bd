"""A model whose stages lie on several ranks, asked by all of them at once as if each had it whole.

    every rank     decode(tokens)   -> stage 0 .. last, in turn; the last has the hidden states, the others zeros
                   logits(hidden)   -> the last makes them, and hands them out

All ranks of the pipe make the same calls with the same arguments, so all of them choose the same tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hvdtrain.comm.axis import Axis
from hvdtrain.cut.flows import Flows
from hvdtrain.models.cache import Cache
from hvdtrain.models.pieces import Flow
from hvdtrain.tasks.task import parts_of

_MOST_UNDER_WAY = 8  # tensors that a stage may have sent before the next one takes them


class Caches:
    """One for each stage that this rank has, which are told the same. See ``Cache``."""

    def __init__(self, of: Mapping[int, Cache]):
        self.of = of

    def branch(self, parents_BN: torch.Tensor) -> None:
        for one in self.of.values():
            one.branch(parents_BN)

    def select(self, rows: torch.Tensor) -> None:
        for one in self.of.values():
            one.select(rows)


class Lockstep:
    """What a task asks a model for, see ``Replica.answering``. stages: this rank's, by number, of ``count`` in all."""

    def __init__(self, stages: Mapping[int, Any], count: int, pipe: Axis, flows: Flows, device: torch.device):
        self._stages, self._count, self._pipe, self._flows, self._device = stages, count, pipe, flows, device
        first = next(iter(stages.values()))
        self.options, self.vocab_size = first.options, first.vocab_size

    @property
    def any_weight(self) -> torch.Tensor:
        return next(self.parameters())

    def parameters(self) -> Iterator[torch.Tensor]:
        for model in self._stages.values():
            yield from model.parameters()

    def eval(self) -> "Lockstep":
        for model in self._stages.values():
            model.eval()
        return self

    def __call__(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        return self.hand_out(self.output(inputs))

    def output(self, inputs: Sequence[torch.Tensor | None], rows_at_once: int = 0) -> torch.Tensor | None:
        """What the model's ``forward`` returns, on the last rank; elsewhere None. rows_at_once: 0: all."""
        outputs = [self._output(part) for part in parts_of(inputs, rows_at_once)]
        return None if outputs[0] is None else torch.cat([output for output in outputs if output is not None])

    def new_cache(self, lengths_B: torch.Tensor | None = None) -> Caches:
        return Caches({number: model.new_cache(lengths_B) for number, model in self._stages.items()})

    def read(self, source_BS: torch.Tensor, source_lengths_B: torch.Tensor, caches: Caches) -> None:
        self._in_turn(lambda n, model, flow: model.read_stage(flow, source_BS, source_lengths_B, caches.of[n]))

    def decode(self, tokens_BT: torch.Tensor, caches: Caches) -> torch.Tensor:
        hidden_BTD = self._in_turn(lambda n, model, flow: model.decode_stage(flow, tokens_BT, caches.of[n]))
        if hidden_BTD is None:
            return torch.zeros(*tokens_BT.shape, self.options.width, device=self._device)
        return hidden_BTD

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        last = self._stages.get(self._count - 1)
        return self.hand_out(None if last is None else last.logits(hidden))

    def hand_out(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """The last rank's, on all ranks."""
        return self._flows.hand_out(tensor, self._pipe.size - 1)

    def _output(self, inputs: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        return self._in_turn(lambda _, model, flow: model.stage(flow, *inputs))

    @torch.no_grad()
    def _in_turn(self, run: Callable[[int, Any, Flow], Flow]) -> torch.Tensor | None:
        """``run(number, model, flow)`` of every stage: the last tensor of the last one's flow; elsewhere None."""
        ranks = self._pipe.size
        flow: Flow = ()
        for number, model in self._stages.items():
            flow = self._flows.receive(None, (number - 1) % ranks).wait() if number else ()
            flow = run(number, model, flow)
            if number + 1 < self._count:
                self._flows.send(flow, (number + 1) % ranks, with_layout=True)
        self._flows.settle(_MOST_UNDER_WAY)
        return flow[-1] if self._count - 1 in self._stages else None
