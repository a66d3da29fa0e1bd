"""A server that does not wait: with one worker it is one process; with several, one model where they meet, and each row
once. What workers do at their own pace is not the same twice: what is exact here holds for every order.
"""

import threading
import time
from pathlib import Path

import pytest
import torch
from dealt import Dealt, dealt, fingerprint, server
from learner import ROWS, Learner, Recipe, check_averages, furthest, held, trained
from threads import PATIENCE_S, ThreadGroup, on_ranks

from hvdtrain.data.batch import Batch
from hvdtrain.errors import ConfigError, RankLostError
from hvdtrain.optim.optimizer import OptimOptions
from hvdtrain.optim.update import Agreed
from hvdtrain.sync import SyncOptions, check_sync
from hvdtrain.sync.parameter_server import ParameterServerOptions


@pytest.mark.parametrize(("servers", "name"), [(1, "adamw"), (1, "lamb"), (3, "adamw")])
def test_with_one_worker_it_is_one_process(servers: int, name: str):
    """Microbatches, clipping, averages. 1e-5 of each tensor's norm: fp32 sums in another order, over 20 steps."""
    common = {"optim": OptimOptions(name=name, lr=0.01, eps=1e-6, clip_norm=0.5), "ema": 0.9, "microbatches": 3}
    (alone,) = trained(1, 20, **common)
    learners = dealt(1 + servers, 20, **common, sync=server(servers))
    assert all(furthest(held(one), held(alone)) <= 1e-5 for one in learners)
    assert learners[0].numbers["staleness_max"] == 0
    check_averages(learners, alone)


@pytest.mark.parametrize("servers", [1, 2])
def test_at_a_small_rate_four_workers_go_the_way_of_one_process(servers: int):
    """Then it matters little which weights a gradient is of: four pushes at a quarter of the rate are one step, in any
    order. 2 % of the way, of which 0.5 % is measured; a push that weighs a tenth less, because it is old, is 2 %.
    """
    common = {"optim": OptimOptions(name="sgd", lr=1e-3, momentum=0.0, weight_decay=0.0, clip_norm=0.0)}
    (start,), (alone,) = trained(1, 0, **common), trained(1, 6, **common)
    sync = server(servers, rate="linear", max_staleness=100)
    learners = dealt(4 + servers, 6, pauses_s=[0, 0.02], **common, sync=sync)
    began = held(start)
    expected = {name: tensor - began[name] for name, tensor in held(alone).items()}
    way = {name: tensor - began[name] for name, tensor in held(learners[0]).items()}
    total = torch.cat([way[name].flatten() - expected[name].flatten() for name in way])
    assert total.norm() <= 0.02 * torch.cat([one.flatten() for one in expected.values()]).norm()


@pytest.mark.parametrize("servers", [1, 2])
def test_several_workers_consume_each_row_once_and_meet_in_one_model(servers: int):
    """One of three is slow. All but the first of their pushes are of weights that others have moved since."""
    learners = dealt(3 + servers, 8, pauses_s=[0, 0.03], sync=server(servers))
    assert sum(one.loader.fingerprint for one in learners) % (1 << 64) == fingerprint(8, 3)
    assert {one.loader.rows_consumed for one in learners} == {8 * ROWS}
    numbers = learners[0].numbers
    assert 0 < numbers["staleness_mean"] <= numbers["staleness_max"] < 24
    assert numbers["rate_factor"] == pytest.approx(3**-0.5, abs=1e-4)
    assert len({int(one.engine.tokens) for one in learners}) == 1
    assert all(furthest(held(one), held(learners[0])) == 0 for one in learners)


def test_a_slow_worker_holds_up_no_rows_of_the_next_step():
    """Two steps of two tickets: while one worker has its first, the other one does all the rest."""
    fast, slow, _ = dealt(3, 2, pauses_s=[0, 2.0], sync=server(1))
    assert (fast.tickets, slow.tickets) == (3, 1)


def test_after_a_meeting_all_know_all_updates():
    def work(group: ThreadGroup) -> float:
        learner = Dealt(group, Recipe(sync=server(1)), 6)
        learner.walk(meetings=range(1, 7))
        return learner.numbers["staleness_max"]

    assert max(on_ranks(3, work)) <= 1


def test_a_worker_that_was_taken_for_lost_comes_back(capfd: pytest.CaptureFixture[str]):
    """Its first rows, which another one has done meanwhile, count once; afterwards it has rows as before."""

    def work(group: ThreadGroup) -> Dealt:
        sync, pauses_s = server(1, survive=True, lost_after_s=1.0), [2.5]
        learner = Dealt(group, Recipe(sync=sync), 12, pause_s=0.0 if group.rank else 0.2)
        share = learner.share

        def hanging_once(step: int, number: int) -> list[Batch]:
            if group.rank == 1 and pauses_s:
                time.sleep(pauses_s.pop())
            return share(step, number)

        learner.share = hanging_once
        learner.walk()
        return learner

    learners = on_ranks(3, work)
    told = capfd.readouterr().err
    assert "rank 1 has not answered for 1 s: others get its rows" in told and "rank 1 is back" in told
    assert sum(one.loader.fingerprint for one in learners) % (1 << 64) == fingerprint(12, 2)
    assert {int(one.engine.tokens) for one in learners} == {12 * ROWS * 8}
    assert learners[0].numbers["lost_workers"] == 0 < learners[1].tickets


def test_rank_0_is_told_of_steps_in_between_and_nobody_waits_for_it():
    """Lines of all steps but the last, in order, each of what came since the one before; with the meeting's, of all."""

    def work(group: ThreadGroup) -> tuple[list[tuple[int, Agreed]], dict[int, Agreed]]:
        learner = Dealt(group, Recipe(sync=server(1)), 12)
        return learner.told, learner.walk(meetings=[6])

    (told, met), *others = on_ranks(3, work)
    steps = [step for step, _ in told]
    assert steps == sorted(set(steps)) and not {6, 12} & set(steps)
    tokens = sum(float(agreed.weight) for _, agreed in told) + sum(float(agreed.weight) for agreed in met.values())
    assert tokens == 12 * ROWS * 8
    assert all(torch.isfinite(agreed.loss) and torch.isfinite(agreed.grad_norm) for _, agreed in told)
    assert all(not lines and list(theirs) == [6, 12] for lines, theirs in others)


def test_a_run_that_has_all_its_steps_behind_it_asks_for_no_rows():
    """Killed after its last step, before its summary."""
    assert on_ranks(3, lambda group: Dealt(group, Recipe(sync=server(1)), 5, done=5).walk()) == [{}] * 3


@pytest.mark.parametrize(("ranks", "asker"), [(3, 0), (4, 1), (4, 2), (4, 3)])
def test_whoever_asks_to_stop_makes_all_meet_after_the_step(ranks: int, asker: int):
    """A worker, the first of two servers, the other one. Of the step where all meet there is one line, that of all."""

    def work(group: ThreadGroup) -> tuple[list[tuple[int, Agreed]], dict[int, Agreed]]:
        learner = Dealt(group, Recipe(sync=server(2)), 40)
        return learner.told, learner.walk(asks_at=5, asker=asker)

    told, found = zip(*on_ranks(ranks, work), strict=True)
    ((step, agreed),) = found[0].items()
    assert 5 <= step <= 7 and int(agreed.flags) >= 1
    assert all([(step, int(agreed.flags))] == [(one, int(told.flags)) for one, told in met.items()] for met in found)
    lines = [number for number, _ in told[0]]
    assert lines == sorted({*lines} - {step}) and lines[-1] < step


@pytest.mark.parametrize("stale", ["refuse", "downweight"])
def test_a_refused_push_moves_nothing_and_its_rows_go_to_another(stale: str):
    learners = dealt(4, 10, pauses_s=[0, 0.05], sync=server(1, max_staleness=2, stale=stale))
    numbers = learners[0].numbers
    assert numbers["stale_pushes"] > 0
    assert numbers["refused_pushes"] == (numbers["stale_pushes"] if stale == "refuse" else 0)
    assert sum(one.loader.fingerprint for one in learners) % (1 << 64) == fingerprint(10, 3)
    assert int(learners[0].engine.tokens) == 10 * ROWS * 8


def test_what_is_too_old_weighs_less():
    soft, hard = (ParameterServerOptions(max_staleness=4, stale=how) for how in ("downweight", "refuse"))
    assert [soft.weight_of(staleness, 4) for staleness in (0, 4, 5, 8)] == [1, 1, 0.8, 0.5]
    assert [hard.weight_of(staleness, 4) for staleness in (0, 4, 5)] == [1, 1, 0]
    assert ParameterServerOptions().weight_of(8, 4) == 1 > ParameterServerOptions().weight_of(9, 4)


def test_a_push_that_weighs_half_moves_half(monkeypatch: pytest.MonkeyPatch):
    common = {"optim": OptimOptions(name="sgd", lr=0.01, momentum=0.0, weight_decay=0.0, clip_norm=0.0)}
    (start,), (alone,) = trained(1, 0, **common), trained(1, 1, **common)
    monkeypatch.setattr(ParameterServerOptions, "weight_of", lambda *_: 0.5)
    found, began = held(dealt(2, 1, **common, sync=server(1))[0]), held(start)
    for name, whole in held(alone).items():
        torch.testing.assert_close(found[name] - began[name], (whole - began[name]) / 2, rtol=1e-3, atol=1e-6)


def test_a_bound_that_refuses_nearly_all_is_refused():
    with pytest.raises(ConfigError, match=r"=2 would refuse nearly all: 4 workers .*; set it to 3 or more"):
        check_sync(server(1, max_staleness=2, stale="refuse"), 4, 100)
    check_sync(server(1, max_staleness=3, stale="refuse"), 4, 100)
    check_sync(server(1, max_staleness=2), 4, 100)
    check_sync(server(1, stale="refuse"), 4, 100)


def test_survival_needs_one_server_and_a_launcher_that_lets_the_others_live(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMPI_MCA_orte_enable_recovery", raising=False)
    with pytest.raises(
        ConfigError, match=r"=2, half of .*servers=1; .*ends all ranks when one dies; start with `mpirun"
    ):
        check_sync(server(2, survive=True), 3, 100)
    monkeypatch.setenv("OMPI_MCA_orte_enable_recovery", "1")
    check_sync(server(1, survive=True), 3, 100)
    waits = ParameterServerOptions(servers=1, survive=True)
    with pytest.raises(ConfigError, match=r"synchronous steps need every worker; set .*=asynchronous"):
        check_sync(SyncOptions(name="parameter_server", parameter_server=waits), 3, 100)


def test_a_server_that_is_silent_for_too_long_ends_the_run():
    """Where it would survive a worker: elsewhere the launcher has ended all ranks by then."""
    is_over = threading.Event()

    def work(group: ThreadGroup) -> None:
        learner = Dealt(group, Recipe(sync=server(1, survive=True, lost_after_s=0.02)), 4)
        if group.rank == 2:
            is_over.wait(PATIENCE_S)
            return
        try:
            learner.walk()
        finally:
            is_over.set()

    with pytest.raises(RankLostError, match=r"^rank 2, which keeps the parameters, has not answered for [01]\.06 s"):
        on_ranks(3, work)


def test_a_save_is_resumed_by_any_number_of_ranks(tmp_path: Path):
    """With one worker the rest is that of one process too, whoever goes on."""
    (unbroken,) = trained(1, 6)

    def save(group: ThreadGroup) -> Path:
        learner = Dealt(group, Recipe(sync=server(2)), 3)
        learner.walk()
        return learner.save(tmp_path)

    folder = on_ranks(3, save)[0]
    for ranks, sync in ((1, SyncOptions()), (2, SyncOptions())):
        recipe = Recipe(sync=sync)
        learners = on_ranks(ranks, lambda group, recipe=recipe: Learner(group, recipe, folder).train(3).weights())
        assert all(furthest(found, held(unbroken)) <= 1e-5 for found in learners)
