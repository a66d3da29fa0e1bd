"""One rank of tests/bench/pipeline.py: a decoder's step in a pipeline, ours and torch.distributed.pipelining's in turn.

    mpirun -np 2 python tests/bench/ways/pipeline_rank.py '{"schedule": "1f1b", ...}'

Both run the same pruned models with the same weights; gradients do not travel between replicas, of which there is one.
"""

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.mesh import Mesh, MeshOptions, make_mesh
from hvdtrain.comm.world import detect_world
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint, fill_slices
from hvdtrain.cut.checker import Costs, check
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.pipeline import Pipeline, _Step
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.cut.schedules import (
    SCHEDULES,
    Action,
    Backward,
    Forward,
    InputGradient,
    Pass,
    WeightGradient,
    with_transfers,
)
from hvdtrain.data.batch import Batch
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.losses import LossTerms
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.pieces import Flow
from hvdtrain.tasks.lm import LanguageModel

CPU, TASK = torch.device("cpu"), LanguageModel()
THEIRS: dict[str, Any] = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "interleaved": pipelining.ScheduleInterleaved1F1B,
}


class StageOf(nn.Module):
    """A stage as torch takes it: tokens go into the first one alone, so the others get some of the same shape."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor):
        super().__init__()
        self.model, self.tokens = model, torch.zeros_like(tokens)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.stage(() if x.dtype == torch.int64 else (x,), self.tokens if x.is_floating_point() else x)[-1]


def theirs(replica: Pipeline, schedule: str, batches: list[Batch], mesh: Mesh) -> Callable[[], None]:
    """A step of torch's."""
    stages = [
        pipelining.PipelineStage(StageOf(model, batches[0].tokens), number, replica._held.count, CPU)
        for number, model in replica._stage.items()
    ]
    head = next((model.head for model in replica._stage.values() if isinstance(model.head, nn.Linear)), None)

    def loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return head.cross_entropy(head.features(hidden).flatten(0, 1), targets.flatten(), LossTerms())

    of = stages if schedule == "interleaved" else stages[0]
    runs = THEIRS[schedule](of, len(batches), loss_fn=loss, scale_grads=False)
    tokens, targets = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "targets"))
    is_first, is_last = mesh.pipe.rank == 0, mesh.pipe.rank == mesh.pipe.size - 1

    def step() -> None:
        runs.step(*([tokens] if is_first else []), **({"target": targets, "losses": []} if is_last else {}))

    return step


class Watch:
    """How long each pass of each stage takes in a step, what it waits for others not counted."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[type[Pass], int], list[float]] = defaultdict(list)
        self._waited = 0.0
        take, receive = _Step.take, _Step._take

        def watched(step: _Step, action: Action) -> None:
            self._waited, begun = 0.0, time.perf_counter()
            take(step, action)
            if isinstance(action, Pass):
                self.seconds[type(action), action.stage].append(time.perf_counter() - begun - self._waited)

        def waiting(step: _Step, made: Pass) -> Flow:
            begun = time.perf_counter()
            received = receive(step, made)
            self._waited += time.perf_counter() - begun
            return received

        _Step.take, _Step._take = watched, waiting  # type: ignore[method-assign]

    def costs(self, mesh: Mesh) -> Costs:
        """Of all ranks' stages (collective)."""
        found: dict[tuple[type[Pass], int], float] = {}
        for of_rank in mesh.pipe.all_gather_object(
            {one: statistics.median(all_) for one, all_ in self.seconds.items()}
        ):
            found |= of_rank
        stages = range(1 + max(stage for _, stage in found))
        forward, whole, first, second = (
            [found.get((kind, stage), 0.0) for stage in stages]
            for kind in (Forward, Backward, InputGradient, WeightGradient)
        )
        backward = [sum(parts) for parts in zip(whole, first, second, strict=True)]
        return Costs(forward, backward, weights_share=sum(second) / sum(backward))


def main(asked: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    group = HorovodGroup(detect_world(), parts=True)
    mesh = make_mesh(group, MeshOptions(pipeline=group.size))
    cut = CutOptions(schedule=asked["schedule"], stages_per_rank=asked["stages_per_rank"])
    options = TransformerOptions(**asked["sizes"], tied=False)
    blueprint = Blueprint(lambda: Decoder(options, asked["vocabulary"]))
    replica = make_replica(blueprint, Making(mesh, PRECISIONS["fp32"], CPU, TASK, cut))
    assert isinstance(replica, Pipeline)
    fill_slices(replica.slices, blueprint.initial(1))
    generator = torch.Generator().manual_seed(1)
    rows = (asked["rows"], options.context + 1)
    windows = [torch.randint(asked["vocabulary"], rows, generator=generator) for _ in range(asked["microbatches"])]
    batches = [Batch(w[:, :-1].contiguous(), w[:, 1:].contiguous(), w[:, 1:].numel()) for w in windows]
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: replica.forward_backward(batches, TASK, 1, None)}
    if cut.schedule in THEIRS:
        store = dist.TCPStore("127.0.0.1", asked["port"], group.size, group.rank == 0)
        dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)
        ways["theirs"] = theirs(replica, cut.schedule, batches, mesh)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    watch = Watch()
    for number in range(asked["steps"] + 1):
        if number == 1:
            watch.seconds.clear()  # the first allocates
        for way, step in ways.items():
            for used in replica.computing:
                used.grad = None
            mesh.pipe.barrier()
            begun = time.perf_counter()
            step()
            mesh.pipe.barrier()
            seconds[way].append(time.perf_counter() - begun)
    costs = watch.costs(mesh)
    bound = check(with_transfers(SCHEDULES[cut.schedule](group.size, len(batches), cut.stages_per_rank)), costs)
    of_rank = [
        sum(costs.forward[n] + costs.backward[n] for n in range(r, replica._held.count, group.size))
        for r in range(group.size)
    ]
    found = {way: statistics.median(times[1:]) for way, times in seconds.items()}
    found |= {"bound": bound.makespan, "balance": statistics.mean(of_rank) / max(of_rank), "bubble": bound.bubble}
    if group.rank == 0:
        print(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()
    group.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
