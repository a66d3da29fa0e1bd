"""The plan: the walk of one step, its random numbers, evaluation."""

import pytest
import torch
import torch.nn.functional as F
from in_halves import InHalves
from threads import LateGroup, ThreadGroup, on_ranks
from tiny import random_tokens, tiny_decoder

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.batch import Batch
from hvdtrain.data.windows import eval_windows
from hvdtrain.sync import SYNCS, SyncOptions
from hvdtrain.sync.allreduce import AllReduceOptions
from hvdtrain.tasks.lm import LanguageModel


def batches_of(count: int, rows: int = 2) -> list[Batch]:
    return [Batch.from_windows(random_tokens(rows * 9, seed=n).reshape(rows, 9)) for n in range(count)]


def gradients(plan: InHalves) -> list[torch.Tensor]:
    return [p.grad.clone() for p in plan.model.parameters()]


def test_every_sync_of_the_table_can_be_chosen():
    for name in SYNCS:
        assert SyncOptions(name=name).name == name
        assert hasattr(SyncOptions(), name)  # its options


def test_accumulation_changes_nothing_but_rounding():
    results = []
    for batches in (batches_of(4), [Batch.from_windows(windows) for windows in [joined(batches_of(4))]]):
        plan = InHalves(tiny_decoder(), LateGroup(), SyncOptions(), "fp32", seed=1)
        plan.forward_backward(batches, LanguageModel(), step=1)
        sums = plan.finish(max_norm=0.0)
        results.append((sums.loss.item(), sums.weight.item(), gradients(plan)))
    (loss, weight, some), (one_loss, one_weight, one) = results
    assert (loss, weight) == (pytest.approx(one_loss, rel=1e-6), one_weight)
    assert all(torch.linalg.norm(a - b) <= 1e-6 * torch.linalg.norm(b) for a, b in zip(some, one, strict=True))


def joined(batches: list[Batch]):
    return torch.cat([torch.cat([b.tokens, b.targets[:, -1:]], dim=1) for b in batches]).numpy()


def test_gradients_travel_in_the_last_backward():
    """Not before: they are not complete. Not after: nothing would overlap."""
    group = LateGroup()
    sync = SyncOptions(allreduce=AllReduceOptions(bucket_mib=2e-3))
    plan = InHalves(tiny_decoder(), group, sync, "fp32", seed=1)

    class Watched(LanguageModel):
        def loss(self, model, output, batch):
            assert group.sent == []
            return super().loss(model, output, batch)

    plan.forward_backward(batches_of(3), Watched(), step=1)
    sent = list(group.sent)
    plan.finish(max_norm=1.0)
    assert len(sent) > 3
    assert group.sent == [*sent, "hvdtrain.sums"]


def test_dropout_depends_on_seed_step_and_replica_alone():
    """So a resumed run draws the same numbers, and no random state is stored."""

    def step_of(seed: int, step: int, replica: int) -> float:
        group = LocalGroup()
        group.rank = replica
        plan = InHalves(tiny_decoder(dropout=0.3), group, SyncOptions(), "fp32", seed)
        torch.rand(step)  # whatever was drawn before
        plan.forward_backward(batches_of(2), LanguageModel(), step)
        return plan.finish(1.0).loss.item()

    losses = [step_of(1, 1, 0), step_of(2, 1, 0), step_of(1, 2, 0), step_of(1, 1, 1)]
    assert len(set(losses)) == 4
    assert step_of(1, 1, 0) == losses[0]


def test_replicas_start_from_rank_0():
    def work(group: ThreadGroup) -> None:
        model = tiny_decoder()
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter.fill_(7.0 + number if group.rank == 0 else torch.nan)
        plan = InHalves(model, group, SyncOptions(), "fp32", 1)
        assert all((p == 7.0 + number).all() for number, p in enumerate(model.parameters()))
        assert len(set(group.copied)) == len(list(model.parameters()))
        assert (plan.engine.mesh.number, plan.engine.mesh.replicas) == (group.rank, 2)

    on_ranks(2, work)


@torch.no_grad()
def test_evaluation_is_the_mean_over_every_target():
    model = tiny_decoder(dropout=0.5)
    tokens = random_tokens(101)

    class Line:
        def __len__(self) -> int:
            return len(tokens)

        def windows(self, starts, length):
            return torch.stack([torch.from_numpy(tokens[s : s + length]) for s in starts.tolist()]).numpy()

        def slice(self, start, length):
            return tokens[start : start + length]

    plan = InHalves(model, LateGroup(), SyncOptions(), "fp32", 1)
    scores = plan.evaluate(eval_windows(Line(), 8, 3, 0, 1), LanguageModel())
    assert model.training  # dropout is back
    model.eval()
    losses = [
        F.cross_entropy(
            model.logits(model(torch.from_numpy(tokens[None, s : s + 8][:, : 100 - s])))[0],
            torch.from_numpy(tokens[s + 1 : s + 9]),
            reduction="sum",
        ).item()
        for s in range(0, 100, 8)
    ]
    assert scores["val_loss"] == pytest.approx(sum(losses) / 100, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(torch.tensor(scores["val_loss"]).exp().item(), rel=1e-5)


def test_a_hopeless_loss_still_has_a_perplexity():
    assert LanguageModel().scores([1e6, 1])["perplexity"] < float("inf")
