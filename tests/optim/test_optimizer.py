"""What decays, what each optimizer is made of, and runs of each through plan and checkpoint."""

import typing
from pathlib import Path

import pytest
import torch
from checkpoints import assert_equal, copies_of, state_of
from in_halves import InHalves
from pydantic import ValidationError
from tiny import random_tokens, tiny_decoder
from torch import nn

from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import load
from hvdtrain.checkpoint.writer import CheckpointOptions, save
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.batch import Batch
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.matrices import block_matrices
from hvdtrain.optim.adam import AdamW
from hvdtrain.optim.lamb import Lamb
from hvdtrain.optim.lars import Lars, whole_norms
from hvdtrain.optim.muon import NewtonSchulz, WholeMatrices
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.sgd import Sgd
from hvdtrain.slices import whole_slices
from hvdtrain.sync import SyncOptions
from hvdtrain.tasks.lm import LanguageModel

NAMES = typing.get_args(OptimOptions.model_fields["name"].annotation)
EVERY = pytest.mark.parametrize("name", NAMES)


def optimizer_of(model: Decoder, options: OptimOptions) -> torch.optim.Optimizer:
    """With the matrices of its blocks, which one of them asks for."""
    named = dict(model.named_parameters())
    parts = {named[name]: rows for name, rows in block_matrices(named, model.options).items()}
    return make_optimizer(named.values(), options, matrices=WholeMatrices(parts, NewtonSchulz()))


def test_the_names():
    """The tests below are of all: here are those that there must be."""
    assert NAMES == ("adamw", "lamb", "lars", "muon", "sgd")
    assert OptimOptions().name == "adamw"


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay_and_have_trust_ratios(name: str, tied: bool):
    model = tiny_decoder(tied=tied)
    groups = make_optimizer(model.parameters(), OptimOptions(name=name, weight_decay=0.3)).param_groups
    found = {id(p): (g["weight_decay"], g["is_adapted"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(model.parameters())) == sum(len(g["params"]) for g in groups)
    for name_, parameter in model.named_parameters():
        is_vector = name_.endswith("bias") or "norm" in name_
        assert found[id(parameter)] == ((0.0, False) if is_vector else (0.3, True)), name_


def test_a_decay_of_0_leaves_the_trust_ratios():
    groups = make_optimizer(tiny_decoder().parameters(), OptimOptions(name="lamb", weight_decay=0.0)).param_groups
    assert [group["is_adapted"] for group in groups] == [True, False]


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(norm: str, tied: bool):
    model = tiny_decoder(norm=norm, tied=tied)
    optimizer = make_optimizer(model.parameters(), OptimOptions(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters())) == sum(len(g["params"]) for g in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        is_vector = name.endswith("bias") or "norm" in name
        assert decay[id(parameter)] == (0.0 if is_vector else 0.3), name


def test_the_options_arrive():
    optimizer = make_optimizer(tiny_decoder().parameters(), OptimOptions(lr=0.5, beta1=0.1, beta2=0.2, eps=0.3))
    assert optimizer.defaults["lr"] == 0.5
    assert optimizer.defaults["betas"] == (0.1, 0.2)
    assert optimizer.defaults["eps"] == 0.3


def test_frozen_parameters_are_left_out():
    model = tiny_decoder()
    model.position.weight.requires_grad_(False)
    ids = {id(p) for group in make_optimizer(model.parameters(), OptimOptions()).param_groups for p in group["params"]}
    assert id(model.position.weight) not in ids
    assert len(make_optimizer(nn.Linear(3, 2, bias=False).parameters(), OptimOptions()).param_groups) == 1


def test_the_first_step_by_hand():
    """AdamW first shrinks a matrix by lr * decay; its first step then moves every entry by lr, against the gradient."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -4.0]]))
        model.bias.fill_(1.0)
    optimizer = make_optimizer(model.parameters(), OptimOptions(lr=0.1, weight_decay=0.5, eps=1e-12))
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, -0.01]]), torch.tensor([7.0])
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[2.0 * 0.95 - 0.1, -4.0 * 0.95 + 0.1]]))
    torch.testing.assert_close(model.bias.detach(), torch.tensor([0.9]))


def test_adamw_is_torchs_fused_one():
    """Five steps to the bit: the digits of the demo hang on it."""
    model, other = tiny_decoder(), tiny_decoder()
    options = OptimOptions(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    matrices = [p for p in other.parameters() if p.dim() >= 2]
    vectors = [p for p in other.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, fused=True)
    for some, optimizer in ((model, make_optimizer(model.parameters(), options)), (other, theirs)):
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            for parameter in some.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# --- every optimizer ---------------------------------------------------------------------------------------------


def test_options_arrive_where_they_are_read():
    model, rates = tiny_decoder(), {"lr": 0.5, "weight_decay": 0.25}
    chosen = {"beta1": 0.1, "beta2": 0.2, "eps": 0.3, "momentum": 0.4, "trust_clip": 6.0, "trust_coefficient": 0.7}
    of_lamb = {"betas": (0.1, 0.2), "eps": 0.3, "trust_clip": 6.0, "bias_correction": False}
    of_lars = {"momentum": 0.4, "trust_clip": 6.0, "trust_coefficient": 0.7}
    for name, kind, own in (
        ("adamw", AdamW, {"betas": (0.1, 0.2), "eps": 0.3, "bias_correction": True}),
        ("lamb", Lamb, of_lamb),
        ("lars", Lars, of_lars),
        ("sgd", Sgd, {"momentum": 0.4}),
    ):
        optimizer = make_optimizer(
            model.parameters(), OptimOptions(name=name, bias_correction=False, **rates, **chosen)
        )
        assert type(optimizer) is kind
        assert {**optimizer.param_groups[0], **rates, **own} == optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_norms_are_asked_of_whom_one_gives(name: str):
    asked = []

    def norms(weights: list[torch.Tensor], others: list[torch.Tensor]) -> torch.Tensor:
        asked.append((len(weights), len(others)))
        return whole_norms(weights, others)

    model = tiny_decoder()
    optimizer = make_optimizer(model.parameters(), OptimOptions(name=name), norms)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert asked == [(sum(p.dim() >= 2 for p in model.parameters()),) * 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "adam"},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"trust_clip": -1.0},
        {"trust_coefficient": 0.0},
        {"bias_correction": 1},
    ],
)
def test_what_cannot_be_is_refused(wrong: dict):
    with pytest.raises(ValidationError):
        OptimOptions(**wrong)


# --- as the loop uses them ---------------------------------------------------------------------------------------

KEEP_ALL = CheckpointOptions(keep_last=0)
# A rate at which each of them learns something in a few steps.
RATES = {"adamw": 0.01, "lamb": 0.05, "lars": 5.0, "muon": 0.01, "sgd": 0.5}


class Training:
    def __init__(self, name: str, precision: str = "fp32", seed: int = 0, **options):
        self.name, self.model = name, tiny_decoder(seed)
        self.optimizer = optimizer_of(self.model, OptimOptions(name=name, weight_decay=1e-3, **options))
        self.plan = InHalves(self.model, LocalGroup(), SyncOptions(), precision, 1)

    def run(self, first: int, last: int) -> list[float]:
        """Losses of steps ``first`` .. ``last`` on one batch."""
        batch = Batch.from_windows(random_tokens(4 * 9).reshape(4, 9))
        losses = []
        for step in range(first, last + 1):
            self.plan.forward_backward([batch], LanguageModel(), step)
            losses.append(self.plan.finish(1.0).loss.item())
            self.plan.step(self.optimizer, RATES[self.name])
        return losses

    def tensors(self) -> dict[str, torch.Tensor]:
        return copies_of(self.model, self.optimizer)


STATES = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "lamb": {"step", "exp_avg", "exp_avg_sq"},
    "lars": {"momentum_buffer"},
    "muon": {"step", "exp_avg", "exp_avg_sq"},  # of an embedding; of a matrix of a block: momentum_buffer
    "sgd": {"momentum_buffer"},
}


@EVERY
def test_each_learns(name: str):
    losses = Training(name).run(1, 30)
    assert losses[-1] < 0.9 * losses[0]


@EVERY
def test_resume_from_a_checkpoint(name: str, tmp_path: Path):
    """A run cut in two is the run that was not, to the bit."""
    unbroken, broken = Training(name), Training(name)
    unbroken.run(1, 5)
    broken.run(1, 2)
    assert set(broken.optimizer.state[broken.model.embedding.weight]) == STATES[name]
    folder = save(tmp_path, state_of(broken.model, broken.optimizer), Progress(2), LocalGroup(), KEEP_ALL)
    resumed = Training(name, seed=9)
    load(folder, whole_slices(resumed.model, LocalGroup()), resumed.optimizer)
    assert_equal(resumed.tensors(), broken.tensors())
    resumed.run(3, 5)
    assert_equal(resumed.tensors(), unbroken.tensors())


@EVERY
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_that_overflows_is_left_out(name: str, steps_before: int):
    """fp16: weights and states stay to the bit, and the next step is a good one."""
    training = Training(name, "fp16")
    training.run(1, steps_before)
    before = training.tensors()
    training.plan.loss_scale.scale.fill_(2.0**40)  # more than fp16 can hold
    training.run(steps_before + 1, steps_before + 1)
    after = training.tensors()
    assert_equal({key: after[key] for key in before}, before)
    assert not any(after[key].any() for key in after.keys() - before.keys())  # begun, and empty
    training.plan.loss_scale.scale.fill_(2.0**10)
    training.run(steps_before + 2, steps_before + 2)
    moved = training.tensors()
    assert all(tensor.isfinite().all() for tensor in moved.values())
    assert not torch.equal(moved["embedding.weight"], before["embedding.weight"])


# --- sgd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_torchs(momentum: float):
    """Momenta begin as zeros: the first step too is the fused one's own, to the bit."""
    model, other = tiny_decoder(), tiny_decoder()
    options = OptimOptions(name="sgd", momentum=momentum, lr=0.1, weight_decay=0.0)
    optimizers = (
        make_optimizer(model.parameters(), options),
        torch.optim.SGD(other.parameters(), 0.1, momentum, fused=True),
    )
    for step in range(3):
        for some, optimizer in zip((model, other), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in some.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert bool(optimizers[0].state[model.embedding.weight]) == (momentum > 0)


def test_sgd_takes_a_parameter_whose_gradient_comes_later():
    """A parameter that no rank used has none; torch's fused SGD cannot begin its momentum after the others'."""
    model = nn.Linear(2, 1)
    optimizer = make_optimizer(model.parameters(), OptimOptions(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.0))
    start = model.bias.item()
    for step in range(3):
        model.weight.grad = torch.ones(1, 2)
        model.bias.grad = torch.ones(1) if step else None
        optimizer.step()
    assert model.bias.item() == pytest.approx(start - 0.1 - 0.15)
