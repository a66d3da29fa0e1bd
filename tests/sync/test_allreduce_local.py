"""The global mean gradient, from one process: against plain autograd, with sums that arrive late."""

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from in_halves import allreduce, update_of
from threads import LateGroup, ThreadGroup, on_ranks
from tiny import loss_of, random_tokens, tiny_decoder
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Agreed
from hvdtrain.slices import Slice, whole_slice
from hvdtrain.sync.allreduce import AllReduceOptions, AllReduceSync
from hvdtrain.sync.buckets import Bucket, make_runs
from hvdtrain.sync.sync import Told
from hvdtrain.tasks.lm import LanguageModel

NO_OPTIMIZER = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
EACH_ITS_OWN, SOME, ONE = 1e-6, 2e-3, 16.0  # MiB; the tiny decoder has 15 KiB of gradients


def batches_of(*sizes: int, padded: int = 0) -> list[Batch]:
    """Microbatches of so many rows each; ``padded`` targets of every first row do not count."""
    batches = []
    for number, rows in enumerate(sizes):
        windows = random_tokens(rows * 9, seed=number).reshape(rows, 9)
        batch = Batch.from_windows(windows)
        targets = batch.targets.clone()
        targets[0, :padded] = IGNORE
        batches.append(Batch(batch.tokens, targets, batch.target_tokens - padded))
    return batches


def plain(model: nn.Module, batches: list[Batch]) -> tuple[nn.Module, torch.Tensor]:
    """A copy of the model with the gradient of the mean loss over all targets, and that loss."""
    model = copy.deepcopy(model)
    tokens, targets = torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches])
    loss = F.cross_entropy(model.logits(model(tokens)).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    loss.backward()
    return model, loss.detach()


def slices_of(parameters: list[nn.Parameter]) -> list[Slice]:
    group = LateGroup()
    return [whole_slice(str(number), parameter, group) for number, parameter in enumerate(parameters)]


def one_step(sync: AllReduceSync, losses: list[Callable[[], torch.Tensor]], weight: int, max_norm: float) -> Agreed:
    sync.begin(len(losses))
    total = torch.zeros((), dtype=torch.float64)
    for loss in losses:
        value = loss()
        value.backward()
        total += value.detach()
    sync.finish(Told(total, [weight]))
    return update_of(NO_OPTIMIZER, max_norm).divide(sync._summed)


def train_step(sync: AllReduceSync, model: nn.Module, batches: list[Batch], max_norm: float = 0.0) -> Agreed:
    task = LanguageModel()
    losses = [lambda batch=batch: loss_of(task, model, batch).total for batch in batches]
    return one_step(sync, losses, sum(batch.target_tokens for batch in batches), max_norm)


def assert_same_gradients(model: nn.Module, expected: nn.Module, relative: float = 1e-6) -> None:
    """1e-6 of each gradient's norm: fp32 sums in another order."""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.linalg.norm(p.grad - q.grad) <= relative * torch.linalg.norm(q.grad) + 1e-9, name


@pytest.mark.parametrize("bucket_mib", [EACH_ITS_OWN, SOME, ONE])
@pytest.mark.parametrize("sizes", [(6,), (2, 2, 2), (1, 5)])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_mean_loss(bucket_mib: float, sizes: tuple[int, ...], tied: bool):
    """Uneven microbatches and padding too: sums, then one division."""
    model, batches = tiny_decoder(tied=tied), batches_of(*sizes, padded=3)
    expected, loss = plain(model, batches)
    sync = allreduce(model, LateGroup(), AllReduceOptions(bucket_mib=bucket_mib))
    sums = train_step(sync, model, batches)
    assert_same_gradients(model, expected)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in expected.parameters()]))
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert sums.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert sums.weight.item() == 48 - 3 * len(sizes)


@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 100.0])
def test_clipping_is_torchs(max_norm: float):
    model, batches = tiny_decoder(), batches_of(2, 1)
    expected, _ = plain(model, batches)
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
    sync = allreduce(model, LateGroup(), AllReduceOptions(bucket_mib=SOME))
    sums = train_step(sync, model, batches, max_norm)
    assert sums.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)  # before clipping
    assert_same_gradients(model, expected)


def test_every_step_begins_empty():
    model = tiny_decoder()
    sync = allreduce(model, LateGroup(), AllReduceOptions(bucket_mib=SOME))
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    for step in range(3):
        batches = batches_of(step + 1, 2)
        expected, _ = plain(model, batches)
        train_step(sync, model, batches, max_norm=0.5)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        assert_same_gradients(model, expected)
        optimizer.zero_grad()  # whoever calls it, as many loops do, does no harm
        train_step(sync, model, batches, max_norm=0.5)
        assert_same_gradients(model, expected)
        update_of(optimizer).apply(lr=0.01 * (step + 1))
        assert {group["lr"] for group in optimizer.param_groups} == {0.01 * (step + 1)}


def test_gradients_that_autograd_puts_elsewhere_are_fetched():
    """Someone sets them to None in between; autograd then makes tensors of its own instead of filling the buckets."""
    model, batches = tiny_decoder(), batches_of(2, 3)
    expected, _ = plain(model, batches)
    sync = allreduce(model, LateGroup(), AllReduceOptions(bucket_mib=SOME))
    train_step(sync, model, batches_of(4))  # leaves something in the buckets
    begin = sync.begin
    sync.begin = lambda passes: (begin(passes), model.zero_grad(set_to_none=True))
    train_step(sync, model, batches)
    assert_same_gradients(model, expected)


# --- when they leave ---------------------------------------------------------------------------------------------


def test_buckets_leave_while_backward_runs_last_layer_first():
    layers = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    group = LateGroup()
    sync = allreduce(layers, group, AllReduceOptions(bucket_mib=EACH_ITS_OWN))
    sync.begin(passes=2)
    layers(torch.ones(1, 4)).sum().backward()
    assert group.sent == []  # a microbatch that is not the last sends nothing
    layers(torch.ones(1, 4)).sum().backward()
    assert group.sent == [f"hvdtrain.gradients.{number}" for number in range(5)]
    sync.finish(Told(torch.zeros(()), [1]))
    assert group.sent[5:] == ["hvdtrain.sums"]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 100, 200, 10**6])
def test_buckets_hold_every_parameter_once_last_first(bucket_bytes: int):
    sizes = [3, 50, 4, 4, 4, 1, 30]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    buckets = [Bucket(run) for run in make_runs(slices_of(parameters), bucket_bytes)]
    assert [number for bucket in buckets for number, _ in bucket.members] == [6, 5, 4, 3, 2, 1, 0]
    for bucket in buckets:
        assert bucket.flat.numel() * 4 <= bucket_bytes or len(bucket.members) == 1
    for bucket, after in pairwise(buckets):  # none could have taken the next one in
        assert bucket.flat.numel() * 4 + after.members[0][1].numel() * 4 > bucket_bytes
    assert len({bucket.run.name for bucket in buckets}) == len(buckets)


def test_a_bucket_has_one_type():
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float64)]
    buckets = [Bucket(run) for run in make_runs(slices_of(parameters), 10**6)]
    assert [bucket.flat.dtype for bucket in buckets] == [torch.float64, torch.float32]


# --- parameters that are used never, sometimes, several times ----------------------------------------------------


@pytest.mark.parametrize("bucket_mib", [EACH_ITS_OWN, ONE])
def test_an_unused_parameter_is_left_alone(bucket_mib: float):
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})
    before = model["unused"].weight.detach().clone()
    sync = allreduce(model, LateGroup(), AllReduceOptions(bucket_mib=bucket_mib))
    optimizer = make_optimizer(model.parameters(), OptimOptions(lr=0.1, weight_decay=0.5))
    for _ in range(3):
        one_step(sync, [lambda: model["used"](torch.ones(2, 3)).sum()], 2, 1.0)
        assert [p.grad is None for p in model.parameters()] == [False, False, True, True]
        update_of(optimizer).apply(0.1)
    assert torch.equal(model["unused"].weight, before)  # neither moved nor decayed
    one_step(sync, [lambda: model["unused"](torch.ones(2, 3)).sum()], 2, 0.0)
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    assert model["unused"].weight.grad.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("bucket_mib", [EACH_ITS_OWN, ONE])
def test_a_parameter_that_only_the_first_microbatch_used(bucket_mib: float):
    model = nn.ModuleDict({name: nn.Linear(3, 1, bias=False) for name in "ab"})
    sync = allreduce(model, LateGroup(), AllReduceOptions(bucket_mib=bucket_mib))
    losses = [lambda: model["a"](torch.ones(4, 3)).sum(), lambda: model["b"](torch.ones(2, 3)).sum()]
    one_step(sync, losses, 2, 0.0)
    assert model["a"].weight.grad.tolist() == [[2.0, 2.0, 2.0]]
    assert model["b"].weight.grad.tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("bucket_mib", [EACH_ITS_OWN, ONE])
@pytest.mark.parametrize(
    ("layers", "recompute"),
    [(1, "no"), (1, "non-reentrant"), (3, "non-reentrant"), (3, "reentrant")],
    ids=["one layer three times", "the same, recomputed", "three layers, recomputed", "three layers, reentrant"],
)
def test_used_several_times_or_computed_again(bucket_mib: float, layers: int, recompute: str):
    """A bucket leaves when the LAST use of its parameters is in it."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))

    def run(model: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for number in range(3):
            layer = model[number % layers]
            y = layer(x) if recompute == "no" else checkpoint(layer, x, use_reentrant=recompute == "reentrant")
            x = torch.tanh(y)
        return x.sum()

    x, expected = torch.randn(5, 4, requires_grad=True), copy.deepcopy(model)
    (run(expected, x) / 5).backward()
    sync = allreduce(model, LateGroup(), AllReduceOptions(bucket_mib=bucket_mib))
    one_step(sync, [lambda: run(model, x)], 5, 0.0)
    assert_same_gradients(model, expected)


def test_a_gradient_that_comes_twice_is_refused():
    """Reentrant checkpointing of a shared layer: the first part has been sent when the second arrives."""
    layer = nn.Linear(4, 4)
    sync = allreduce(layer, LateGroup(), AllReduceOptions())
    sync.begin(passes=1)
    hidden = checkpoint(layer, torch.randn(5, 4, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(layer, hidden, use_reentrant=True).sum().backward()


def test_frozen_parameters_stay_out():
    model = tiny_decoder()
    model.position.weight.requires_grad_(False)
    sync = allreduce(model, LateGroup(), AllReduceOptions())
    train_step(sync, model, batches_of(2))
    assert model.position.weight.grad is None
    sync.close()  # from now on gradients are nobody's business
    model.zero_grad()
    train_step(allreduce(model, LateGroup(), AllReduceOptions()), model, batches_of(2))


# --- two ranks ---------------------------------------------------------------------------------------------------


def test_uneven_ranks_do_not_bias_the_gradient():
    whole, batches = tiny_decoder(), batches_of(1, 4, padded=5)
    expected, loss = plain(whole, batches)

    def work(group: ThreadGroup) -> tuple[nn.Module, Agreed]:
        model = copy.deepcopy(whole)
        sync = allreduce(model, group, AllReduceOptions(bucket_mib=SOME))
        return model, train_step(sync, model, [batches[group.rank]])

    for model, sums in on_ranks(2, work):
        assert_same_gradients(model, expected)
        assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert sums.weight.item() == 8 * 5 - 10


def test_what_one_rank_used_moves_on_all():
    """Rank 0 used a, rank 1 used b, neither used c."""
    whole = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in "abc"})

    def work(group: ThreadGroup) -> list:
        model = copy.deepcopy(whole)
        sync = allreduce(model, group, AllReduceOptions(bucket_mib=EACH_ITS_OWN))
        name, rows = [("a", 1), ("b", 3)][group.rank]
        one_step(sync, [lambda: model[name](torch.ones(rows, 2)).sum()], rows, 0.0)
        return [p.grad.tolist() if p.grad is not None else None for p in model.parameters()]

    assert on_ranks(2, work) == [[[[0.25, 0.25]], [[0.75, 0.75]], None]] * 2


def test_what_is_sent_is_counted():
    """Four ranks send each number of a ring all-reduce 2 x 3/4 times, of 4 bytes or of 2."""

    def sent_mib(wire: str) -> list[float]:
        def work(group: ThreadGroup) -> float:
            sync = allreduce(nn.Linear(511, 512), group, AllReduceOptions(wire=wire))
            return sync.report()["sent_mib"]

        return on_ranks(4, work)

    assert (sent_mib("fp32"), sent_mib("bf16")) == ([1.5] * 4, [0.75] * 4)
