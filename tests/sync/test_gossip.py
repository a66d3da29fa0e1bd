"""Gossip: against mixing matrices and plain torch, mass on its way, and the one model of all."""

import pytest
import torch
from apart import PLAIN_SGD, TASK, Training, assert_equal, batch_of, distance
from threads import ThreadGroup, on_ranks
from tiny import tiny_decoder

from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.gossip import GossipOptions
from hvdtrain.sync.topologies import matrices

ROUNDING = 1e-6  # of all weights together, fp32


def gossip(**options) -> SyncOptions:
    return SyncOptions(name="gossip", gossip=GossipOptions(**options))


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()


def step_of(z: torch.Tensor, step: int, rank: int, ranks: int) -> torch.Tensor:
    """What plain SGD moves a model by, whose weights are ``z``."""
    model = tiny_decoder()
    torch.nn.utils.vector_to_parameters(z.float(), model.parameters())
    batch = batch_of(step, rank, ranks)
    loss = TASK.loss(model, model(*TASK.inputs(batch)), batch)
    (loss.total / loss.weight).backward()
    return -PLAIN_SGD.lr * torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double()


def trained(group: ThreadGroup, sync: SyncOptions, steps: int) -> torch.Tensor:
    run = Training(group, sync, PLAIN_SGD)
    for _ in range(steps):
        run.step()
    found = flat(run.model)
    run.save()
    return found


@pytest.mark.parametrize(
    ("topology", "ranks", "every"), [("ring", 3, 1), ("torus", 4, 2), ("hypercube", 4, 1), ("exponential", 4, 1)]
)
def test_d_psgd_is_its_matrix(topology: str, ranks: int, every: int):
    """x <- W x - lr g(x), W one of the topology's, at each step or every so many."""
    mixing = matrices(topology, ranks)
    x = torch.stack([flat(tiny_decoder())] * ranks)
    for step in range(1, 6):
        moves = torch.stack([step_of(x[rank], step, rank, ranks) for rank in range(ranks)])
        if step % every == 0:
            x = mixing[step // every % len(mixing)] @ x
        x = x + moves
    found = torch.stack(on_ranks(ranks, lambda group: trained(group, gossip(topology=topology, every=every), 5)))
    assert torch.linalg.norm(found - x) <= ROUNDING * torch.linalg.norm(x)
    assert torch.linalg.norm(x - x.mean(0)) > 1e-3 * torch.linalg.norm(x)  # or anything would pass


@pytest.mark.parametrize(("topology", "every"), [("exponential", 1), ("ring", 2)])
def test_push_is_its_matrix_one_exchange_late(topology: str, every: int):
    """(x, s) <- W_ii (x, s) - lr (g(x / s), 0) + what came of the exchange before."""
    ranks = 4
    mixing = matrices(topology, ranks)
    x, s = torch.stack([flat(tiny_decoder())] * ranks), torch.ones(ranks, 1, dtype=torch.float64)
    came = torch.zeros_like(x), torch.zeros_like(s)
    for step in range(1, 7):
        moves = torch.stack([step_of(x[rank] / s[rank], step, rank, ranks) for rank in range(ranks)])
        if step % every == 0:
            matrix = mixing[step // every % len(mixing)]
            own = torch.diag(matrix.diagonal())
            sent = (matrix - own) @ x, (matrix - own) @ s
            x, s = own @ x + came[0], own @ s + came[1]
            came = sent
        x = x + moves
    found = torch.stack(
        on_ranks(ranks, lambda group: trained(group, gossip(topology=topology, push=True, every=every), 6))
    )
    assert torch.linalg.norm(found - x / s) <= ROUNDING * torch.linalg.norm(x / s)
    assert (s < 0.9).all()  # the shares matter: x alone is far from a model


@pytest.mark.parametrize(("push", "topology"), [(False, "exponential"), (True, "exponential"), (True, "ring")])
def test_nothing_is_lost_on_the_way(push: bool, topology: str):
    """Replicas that learn nothing keep the mean that they began with, whenever they look, messages under way or not."""
    still = OptimOptions(name="sgd", lr=1e-30, momentum=0.0, weight_decay=0.0)

    def work(group: ThreadGroup) -> list[dict]:
        run = Training(group, gossip(push=push, topology=topology), still)
        with torch.no_grad():  # from here on they are not alike
            for parameter in run.model.parameters():
                parameter.add_(group.rank)
        seen = []
        for _ in range(4):
            run.step(shown=True)
            with run.sync.viewed():
                seen.append(run.weights())
        run.save()
        return [*seen, run.weights()]

    start = dict(tiny_decoder().named_parameters())
    expected = {name: value.detach() + 1.5 for name, value in start.items()}
    for seen in on_ranks(4, work):
        for found in seen:
            assert_equal(found, expected, ROUNDING)


def test_the_distance_is_that_of_the_replicas():
    def work(group: ThreadGroup) -> tuple:
        run = Training(group, gossip())
        run.step()
        run.step(shown=True)
        found = flat(run.model)
        told = run.sync.report()
        run.save()
        return found, told

    found, told = zip(*on_ranks(4, work), strict=True)
    x = torch.stack(found)
    expected = (x - x.mean(0)).square().sum(1).mean().sqrt().item()
    assert [one["consensus_distance"] for one in told] == [pytest.approx(expected, rel=1e-5)] * 4
    assert told[0]["sent_mib"] == pytest.approx((x[0].numel() + 1) * 4 / 2**20, rel=1e-4)  # one peer a step
    assert distance({"": x[0]}, {"": x[1]}) > 1e-4


def test_the_gap_is_said():
    def work(group: ThreadGroup) -> list[str]:
        run = Training(group, gossip(topology="ring"))
        run.save()
        return run.sync.notes

    assert on_ranks(4, work)[0] == ["sync.gossip.topology=ring of 4 replicas: spectral gap 0.667"]
