"""What replicas that step apart promise: one model at a save, resumed bit for bit, viewed without a trace."""

import pytest
import torch
from apart import ADAMW, MUON, Training, assert_equal, batch_of
from threads import ThreadGroup, on_ranks

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.batch import Batch
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.average import AverageOptions
from hvdtrain.sync.gossip import GossipOptions
from hvdtrain.sync.local_sgd import LocalSgdOptions

MODES = {
    "local": SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(every=4)),
    "kept": SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(every=4, optimizer="kept")),
    "adaptive": SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(every=4, adaptive=True)),
    "post-local": SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(every=4, after_steps=3)),
    "diloco": SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(every=4, outer="nesterov", optimizer="kept")),
    "slowmo": SyncOptions(name="local_sgd", local_sgd=LocalSgdOptions(every=4, outer="slowmo", optimizer="reset")),
    "gossip": SyncOptions(name="gossip", gossip=GossipOptions(topology="ring", every=2)),
    "push": SyncOptions(name="gossip", gossip=GossipOptions(push=True)),
    "mean": SyncOptions(name="average"),
    "soup": SyncOptions(name="average", average=AverageOptions(fuse="soup")),
}


@pytest.mark.parametrize("mode", MODES)
def test_stopped_and_resumed_is_bit_equal(mode: str):
    """Saved within a round: at step 6, where rounds end at 4 and 8."""
    sync = MODES[mode]

    def unbroken(group: ThreadGroup) -> tuple:
        run = Training(group, sync).to(11, save_at=6)
        return run.kept, run.save()

    runs = on_ranks(2, unbroken)
    for saved, end in runs[1:]:  # one model, one optimizer's state
        assert_equal(saved, runs[0][0])
        assert_equal(end, runs[0][1])

    def resumed(group: ThreadGroup) -> dict:
        return Training(group, sync, done=6, saved=runs[0][0]).to(11).save()

    for end in on_ranks(2, resumed):
        assert_equal(end, runs[0][1])
    assert all("rank" not in name for name in runs[0][0])
    on_ranks(3, resumed)  # on other ranks it goes on as well


@pytest.mark.parametrize("mode", ["post-local", "slowmo", "push"])
def test_with_muon_too(mode: str):
    """Its momenta of matrices beside AdamW's moments of the rest: averaged, begun anew, and kept."""

    def unbroken(group: ThreadGroup) -> tuple:
        run = Training(group, MODES[mode], MUON).to(9, save_at=6)
        return run.kept, run.save()

    runs = on_ranks(2, unbroken)
    saved, end = runs[0]
    assert_equal(runs[1][1], end)
    momenta = [name for name in end if name.startswith("optimizer.momentum_buffer.")]
    assert len(momenta) == 8 and not any("embedding" in name or "norm" in name for name in momenta)
    for resumed in on_ranks(2, lambda group: Training(group, MODES[mode], MUON, done=6, saved=saved).to(9).save()):
        assert_equal(resumed, end)


@pytest.mark.parametrize("mode", ["local", "diloco", "gossip", "push", "mean"])
def test_a_look_leaves_no_trace(mode: str):
    def work(group: ThreadGroup, looks: bool) -> tuple:
        run = Training(group, MODES[mode])
        seen = []
        for _ in range(7):
            run.step()
            if looks:
                own = run.weights()
                with run.sync.viewed():
                    seen.append(run.weights())
                assert_equal(run.weights(), own)
                run.engine.check_replicas(run.step_number)  # of the one model, although they are apart
        return seen, run.save()

    looked = on_ranks(2, lambda group: work(group, looks=True))
    for one, other in zip(looked[0][0], looked[1][0], strict=True):
        assert_equal(one, other)
    assert_equal(looked[0][1], on_ranks(2, lambda group: work(group, looks=False))[0][1])


@pytest.mark.parametrize("mode", ["local", "kept", "gossip", "push", "mean"])
def test_one_rank_is_one_process(mode: str):
    expected = Training(LocalGroup(), SyncOptions()).to(5).weights()
    assert_equal(Training(LocalGroup(), MODES[mode]).to(5).weights(), expected)


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights", "fp16"])
def test_every_precision_settles(precision: str):
    """The copy that computes follows; the scales of the loss become one."""

    def work(group: ThreadGroup) -> tuple:
        run = Training(group, MODES["local"], ADAMW, precision=precision)
        for _ in range(5):
            run.step()
        scale = run.engine.update.loss_scale
        if scale is not None:
            scale.load((16.0 / 2**group.rank, 3))
        saved = run.save()
        copied = [c.detach().clone() for c in run.engine.replica.computing]
        return saved, copied, None if scale is None else scale.state()

    (one, copied, scale), (other, _, other_scale) = on_ranks(2, work)
    assert_equal(one, other)
    names = [name for name in one if name.startswith("model.")]
    for copy, name in zip(copied, names, strict=True):
        assert torch.equal(copy, one[name].to(copy.dtype))
    assert scale == other_scale == ((8.0, 3) if precision == "fp16" else None)


def test_accumulation_is_a_larger_microbatch():
    def halves(step: int, rank: int) -> list[Batch]:
        batch = batch_of(step, rank, 2)
        return [Batch(batch.tokens[rows], batch.targets[rows], 24) for rows in (slice(0, 3), slice(3, 6))]

    def work(group: ThreadGroup, accumulates: bool) -> dict:
        run = Training(group, MODES["local"])
        for step in range(1, 5):
            run.step(saved=step == 4, batches=halves(step, group.rank) if accumulates else None)
        return run.save()

    whole, parts = (on_ranks(2, lambda group, a=a: work(group, a))[0] for a in (False, True))
    weights = [name for name in whole if name.startswith("model.")]
    # AdamW divides by the root of a square: a rounding of tiny gradients is no rounding of its step. Seen: 4e-6.
    assert_equal({name: parts[name] for name in weights}, {name: whole[name] for name in weights}, 1e-4)
