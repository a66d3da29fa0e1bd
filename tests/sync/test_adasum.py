"""Adasum beside its formula, on ranks that are threads; tests/mpi/test_adasum_ranks.py has Horovod's."""

import pytest
import torch
from learner import Learner, Recipe
from threads import ThreadGroup, adasum, on_ranks
from tiny import loss_of

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import ConfigError
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.sync import SyncOptions, check_sync
from hvdtrain.sync.allreduce import AllReduceOptions

ADASUM = SyncOptions(allreduce=AllReduceOptions(combine="adasum", bucket_mib=1e-3))
# A step of 1 without momentum: what moves is the gradient.
GRADIENT = Recipe(ADASUM, OptimOptions(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, clip_norm=0.0))


def means(learner: Learner, step: int) -> dict[str, torch.Tensor]:
    """Of this rank's rows: the gradient of their mean loss."""
    alone = Learner(LocalGroup(), GRADIENT)
    alone.engine.close()
    model = alone.engine.replica.compute
    losses = [loss_of(learner.task, model, batch) for batch in learner.microbatches(step)]
    (sum(loss.total for loss in losses) / sum(loss.weight for loss in losses)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_step_is_the_formulas_of_each_parameter(ranks: int):
    """The second rank has fewer rows: its mean counts as much as the others', unlike its sum."""

    def work(group: ThreadGroup) -> tuple[dict, dict, str]:
        learner = Learner(group, GRADIENT)
        if group.rank == 1:
            learner.microbatches = lambda step, all=learner.microbatches: all(step)[:1]
        parameters = dict(learner.engine.replica.compute.named_parameters())
        mine = means(learner, 1)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        learner.step()
        moved = {name: before[name] - parameter.detach() for name, parameter in parameters.items()}
        assert learner.engine.noise.value() is None
        return mine, moved, learner.sync.drift.bound

    found = on_ranks(ranks, work)
    for name in found[0][0]:
        expected = adasum([mine[name] for mine, _, _ in found])
        for _, moved, _ in found:
            assert torch.equal(moved[name], found[0][1][name])
            torch.testing.assert_close(moved[name], expected, rtol=1e-4, atol=1e-6)
    assert found[0][2] == f"gradients between the mean of {ranks} replicas' and their sum"


def test_the_formula():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 2.0])
    assert adasum([a, b]).tolist() == [3, 2]  # nothing in common
    assert adasum([a, a]).tolist() == [3, 0]  # they agree
    assert adasum([a, 3 * a]).tolist() == [6, 0]  # (1 - 27/18) a + (1 - 27/162) 3a
    assert adasum([a, 0 * a]).tolist() == [3, 0]  # one has nothing to say
    assert adasum([a, a, b, b]).tolist() == [3, 2]


@pytest.mark.parametrize("ranks", [3, 6, 12])
def test_ranks_that_cannot_be_paired_are_refused(ranks: int):
    with pytest.raises(ConfigError, match=f"combine=adasum combines ranks two by two, and {ranks} are no power of two"):
        check_sync(ADASUM, ranks, 100)


def test_the_way_out_names_counts_that_fit():
    with pytest.raises(ConfigError, match=r"start 4 or 8 ranks, or set sync.allreduce.combine=sum$"):
        check_sync(ADASUM, 6, 100)
    check_sync(ADASUM, 8, 100)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_it_is_mpis(backend: str):
    with pytest.raises(ConfigError, match=f"Horovod has it over MPI, and gradients travel over {backend} here; set"):
        check_sync(ADASUM, 2, 100, backend)


@pytest.mark.parametrize("topology", ["hierarchical", "torus"])
def test_ways_of_nccl_are_refused_elsewhere(topology: str):
    sync = SyncOptions(allreduce=AllReduceOptions(topology=topology))
    for backend, why in (("mpi", "mpi here"), ("gloo", "gloo here"), ("none", "nothing: there is one rank here")):
        with pytest.raises(ConfigError, match=f"topology={topology}: Horovod has it over NCCL alone.* over {why}; set"):
            check_sync(sync, 4, 100, backend)
    check_sync(sync, 4, 100, "nccl")
