"""A pipeline over the ranks against one process: gradients of a step, and the weights after twenty, with dropout."""

from functools import cache
from typing import Any

import pytest
import torch
from pipelines import ALONE, TASKS, added_up, apart, batches, gradients, made

from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import Mesh, MeshOptions, make_mesh
from hvdtrain.cut.cut import Replica
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.schedules import SCHEDULES
from hvdtrain.engine import Engine
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Update
from hvdtrain.slices import Slice, whole_rect
from hvdtrain.sync import SyncOptions, make_sync

STEPS, MICROBATCHES, LR, CLIP_NORM = 20, 4, 0.003, 0.5
# A larger eps than usual: weights that begin 1e-7 apart are 5e-5 apart after these steps with 1e-4, and 2e-6 with this.
OPTIM = OptimOptions(eps=1e-3)
MOST_OF_GRADIENTS = 2e-6  # of a tensor's norm. Seen: 2.5e-7
MOST_OF_WEIGHTS = 1e-5  # Seen: 1.2e-6
DROPOUT = 0.1
LAYERS = {"decoder": 4, "encoder": 4, "seq2seq": 2}  # enough for eight stages


@cache
def mesh_of(group: Group, pipeline: int, tensor: int = 1) -> Mesh:
    return make_mesh(group, MeshOptions(pipeline=pipeline, tensor=tensor))


def trained(replica: Replica, mesh: Mesh, name: str, microbatches: list[Any]) -> dict[str, torch.Tensor]:
    sync = make_sync(SyncOptions(), replica.slices, replica.computing, mesh, replica.uses)
    optimizer = make_optimizer([piece.tensor for piece in sync.moves], OPTIM, sync.norms)
    update = Update(optimizer, CLIP_NORM, Guard(GuardOptions(), replica.device))
    engine = Engine(replica, sync, update, mesh, seed=3)
    for step in range(1, STEPS + 1):
        engine.forward_backward(microbatches, TASKS[name][1], step)
        engine.finish()
        engine.step(LR, step)
    engine.close()
    return {piece.name: piece.tensor.detach().clone() for piece in replica.slices}


@cache
def alone(group: Group, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of the first step, and weights after the last, by one process."""

    def work() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        first = gradients(made(name, layers=LAYERS[name], dropout=DROPOUT), name, MICROBATCHES)
        return first, trained(
            made(name, layers=LAYERS[name], dropout=DROPOUT), ALONE, name, batches(name, MICROBATCHES)
        )

    return group.all_gather_object(group.on_main(work))[0]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipeline_over_all_ranks_is_one_process(horovod: Group, schedule: str, name: str):
    if horovod.size not in (2, 4):
        print(f"{horovod.size} ranks: no pipeline")
        return
    mesh = mesh_of(horovod, horovod.size)
    cut = CutOptions(schedule=schedule, stages_per_rank=2 if schedule == "interleaved" else 1)
    expected_gradients, expected_weights = alone(horovod, name)
    found = added_up(
        horovod.all_gather_object(
            gradients(made(name, mesh, cut, layers=LAYERS[name], dropout=DROPOUT), name, MICROBATCHES)
        )
    )
    distance, where = apart(found, expected_gradients)
    assert distance < MOST_OF_GRADIENTS, where
    weights = trained(
        made(name, mesh, cut, layers=LAYERS[name], dropout=DROPOUT), mesh, name, batches(name, MICROBATCHES)
    )
    distance, where = apart(weights, {name: expected_weights[name] for name in weights})
    assert distance < MOST_OF_WEIGHTS, where


@pytest.mark.parametrize("name, mesh", [("decoder", (2, 1)), ("encoder", (2, 2)), ("seq2seq", (2, 2))])
def test_pipelines_of_two_ranks_with_another_axis(horovod: Group, name: str, mesh: tuple[int, int]):
    """Two replicas that share the batch, and the gradient of what several stages have is a sum of four ranks' or more;
    or one replica whose layers are cut too. Without dropout: each replica, and each part, draws its own.
    """
    if horovod.size != 4:
        print(f"{horovod.size} ranks: not two times two")
        return
    cut, every = mesh_of(horovod, *mesh), batches(name, MICROBATCHES)
    plain = {"layers": 2, "dropout": 0.0}
    expected = trained(made(name, **plain), ALONE, name, every)
    replica = made(name, cut, **plain)
    weights = trained(replica, cut, name, every[cut.number :: cut.replicas])
    distance, where = apart(weights, {piece.name: part_of(expected[piece.name], piece) for piece in replica.slices})
    assert distance < MOST_OF_WEIGHTS, where


def part_of(whole: torch.Tensor, piece: Slice) -> torch.Tensor:
    return torch.cat([whole[place.index_in(whole_rect(whole.shape))] for place in piece.places])
