"""A parameter server is all-reduce in another order: the same weights, states in shares, servers without rows."""

from pathlib import Path

import pytest
import torch
from checkpoints import tensors_in
from hypothesis import given
from hypothesis import strategies as st
from learner import Learner, Recipe, check_averages, furthest, held, trained
from threads import ThreadGroup, on_ranks
from torch import nn

from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.errors import ConfigError
from hvdtrain.optim.guard import Guard, GuardOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Update
from hvdtrain.slices import whole_slices
from hvdtrain.sync import SyncOptions, make_sync
from hvdtrain.sync.parameter_server import ParameterServerOptions
from hvdtrain.sync.server_messages import Roles
from hvdtrain.sync.sync import Told

BUCKET_MIB = 4e-3  # a thousand numbers; the tiny decoder has 5,300: more buckets than a server has room for
WAYS = pytest.mark.parametrize(
    ("ranks", "servers", "name"), [(2, 0, "adamw"), (2, 1, "adamw"), (3, 1, "lamb"), (4, 2, "lamb"), (4, 0, "adamw")]
)


def server(servers: int) -> SyncOptions:
    options = ParameterServerOptions(servers=servers, bucket_mib=BUCKET_MIB)
    return SyncOptions(name="parameter_server", parameter_server=options)


def optim(name: str = "adamw", **more: object) -> OptimOptions:
    return OptimOptions(**{"name": name, "lr": 0.01, "eps": 1e-6, **more})


@given(st.integers(1, 9), st.integers(0, 8), st.integers(1, 500))
def test_the_parts_are_everything_once(ranks: int, servers: int, length: int):
    roles = Roles(ranks, min(servers, ranks - 1))
    parts = [roles.part(rank, length) for rank in range(ranks)]
    covered = [n for begin, end in parts for n in range(begin, end)]
    assert covered == list(range(length))
    assert len(roles.workers) + roles.servers == ranks
    if roles.servers:
        assert all(begin == end for begin, end in parts[: -roles.servers])


@WAYS
def test_weights_after_20_steps_are_those_of_one_process(ranks: int, servers: int, name: str):
    """1e-5 of each tensor's norm: fp32 sums in another order, over 20 steps; clipped by the norm over all servers. The
    optimizer's state is kept once, and by workers beside servers not at all.
    """
    common = {"optim": optim(name), "microbatches": 3}
    (alone,) = trained(1, **common)
    learners = trained(ranks, **common, sync=server(servers))
    assert all(furthest(held(one), held(alone)) <= 1e-5 for one in learners)
    states = [one.state_bytes() for one in learners]
    assert sum(states) == alone.state_bytes()
    keepers = states[ranks - servers :] if servers else states
    assert states[: ranks - len(keepers)] == [0] * (ranks - len(keepers))
    assert max(keepers) <= alone.state_bytes() / len(keepers) * 1.1


@pytest.mark.parametrize("servers", [0, 2])
def test_what_else_moves_a_step(servers: int):
    """Rates by layer, frozen parameters, the guard, averages and the noise scale."""
    common = {
        "optim": optim(layer_decay=0.7, freeze=1),
        "guard": GuardOptions(policy="skip", spike_norm=50.0),
        "ema": 0.9,
    }
    workers = 4 - servers
    whole, learners = trained(workers, 8, **common)[0], trained(4, 8, **common, sync=server(servers))
    assert all(furthest(held(one), held(whole)) <= 1e-5 for one in learners)
    assert all(one.engine.noise.state() == pytest.approx(whole.engine.noise.state(), rel=1e-4) for one in learners)
    check_averages(learners, whole)


@pytest.mark.parametrize("servers", [0, 2])
def test_all_ranks_see_the_averages_and_then_the_weights(servers: int):
    """What a server swaps for its averages reaches everybody, and what comes back is what was there."""

    def work(group: ThreadGroup) -> tuple[list[torch.Tensor], bool]:
        learner = Learner(group, Recipe(sync=server(servers), ema=0.9)).train(3)
        learner.engine.check_replicas(3)
        learner.engine.check(3)
        before = [piece.tensor.detach().clone() for piece in learner.engine.replica.slices]
        with learner.engine._viewed():
            seen = [piece.tensor.detach().clone() for piece in learner.engine.replica.slices]
        after = [piece.tensor for piece in learner.engine.replica.slices]
        return seen, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    (first, _), *_ = found = on_ranks(4, work)
    assert all(is_restored for _, is_restored in found)
    assert all(torch.equal(a, b) for seen, _ in found for a, b in zip(seen, first, strict=True))


@pytest.mark.parametrize("servers", [0, 1])
def test_what_nobody_used_stays_and_what_one_used_moves(servers: int):
    """Worker 0 uses a and b, worker 1 b and c, in the second pass alone. Nobody uses d: it does not decay either."""

    def work(group: ThreadGroup) -> list[list[float]]:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(8, 5)) for name in "abcd"})
        mesh = whole_replicas(group, servers)
        options = ParameterServerOptions(servers=servers, bucket_mib=2e-4)
        sync = make_sync(
            SyncOptions(name="parameter_server", parameter_server=options),
            whole_slices(model, group),
            list(model.values()),
            mesh,
        )
        optimizer = make_optimizer(
            [piece.tensor for piece in sync.moves], optim("sgd", momentum=0.0, weight_decay=0.1), sync.norms
        )
        sync.begin(2 if mesh.has_rows else 0)
        if mesh.has_rows:
            model["b"].sum().backward()
            (model["b"].sum() + 3 * model["ac"[group.rank]].sum()).backward()
        sync.finish(Told(torch.ones(()), [1, 1] if mesh.has_rows else []))
        update = Update(optimizer, 0.0, Guard(GuardOptions(), torch.device("cpu")))
        sync.step(update, lr=0.5)
        sync.settle(update)
        return [parameter.unique().tolist() for parameter in model.values()]

    # b: twice on two workers; a, c: three times one; each divided by 4 targets, at a rate of a half. Decay: 0.05 more
    for found in on_ranks(2 + servers, work):
        assert found == [pytest.approx([value]) for value in (0.95 - 3 / 8, 0.95 - 4 / 8, 0.95 - 3 / 8, 1.0)]


def test_a_save_is_resumed_by_any_number_of_ranks_and_servers(tmp_path: Path):
    common = {"optim": optim(), "ema": 0.9}
    (unbroken,) = trained(1, 6, **common)

    def save(group: ThreadGroup) -> Path:
        return Learner(group, Recipe(**common, sync=server(2))).train(3).save(tmp_path)

    folder = on_ranks(4, save)[0]
    assert {name.split(".")[0] for name in tensors_in(folder)} == {"model", "optimizer", "ema", "ema_began"}
    for ranks, sync in ((1, SyncOptions()), (2, server(1)), (3, server(0))):
        recipe = Recipe(**common, sync=sync)
        learners = on_ranks(ranks, lambda group, recipe=recipe: Learner(group, recipe, folder).train(3).weights())
        assert all(furthest(found, held(unbroken)) <= 1e-5 for found in learners)


def test_what_is_sent_is_counted():
    """Of n numbers a worker sends all; a server of two sends half of them to each of two workers."""
    learners = trained(4, 1, sync=server(2))
    n = sum(tensor.numel() for tensor in held(learners[0]).values())
    sent = [one.sync.report()["sent_mib"] * 2**20 / 4 / n for one in learners]
    assert sent == pytest.approx([1, 1, 1, 1], rel=0.1)
    assert [one.sync.report()["sent_mib"] for one in trained(2, 1, sync=server(0))] == pytest.approx(
        [2 * 0.5 * n * 4 / 2**20] * 2, rel=0.1
    )


def test_servers_that_leave_no_workers_are_refused():
    for servers, ranks, message in (
        (1, 1, "servers=1 leaves none of 1 rank to train; start 2 ranks or more, or set it to 0 "),
        (5, 4, "servers=5 leaves none of 4 ranks to train; start 6 ranks or more, or set it to 3 or fewer "),
    ):
        with pytest.raises(ConfigError, match=message):
            server(servers).workers_of(ranks)
    assert server(3).workers_of(4) == 1
    assert SyncOptions(parameter_server=ParameterServerOptions(servers=9)).workers_of(4) == 4
