"""Checkpoints: what is saved is loaded to the bit, and a run that was cut in two is the run that was not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import CPU, random_tokens, stream_of, tiny_decoder
from torch import nn

from hvdtrain import checkpoint
from hvdtrain.checkpoint import CheckpointOptions, Progress, folder_of, newest_valid, read_progress, steps_saved
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import WindowSource
from hvdtrain.errors import CheckpointError
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.parallel.plan import Plan, SyncOptions
from hvdtrain.tasks.lm import LanguageModel

GROUP = LocalGroup()
KEEP_ALL = CheckpointOptions(keep_last=0)


class Training:
    """A model with dropout on its way: what train.py keeps together."""

    def __init__(self, stream: TokenStream, seed: int = 0, **options):
        self.model = tiny_decoder(seed, dropout=0.2, **options).train()
        self.optimizer = make_optimizer(self.model, OptimOptions())
        self.plan = Plan(self.model, GROUP, SyncOptions(), "fp32", seed=5)
        source = WindowSource(stream, WindowSampler(len(stream), 8, seed=5), Feed(8, 5, 4, microbatch=2))
        self.loader = TrainLoader(source, CPU)
        self.step = 0

    def run(self, steps: int) -> "Training":
        for self.step in range(self.step + 1, self.step + steps + 1):  # noqa: B020
            self.plan.forward_backward(self.loader.next_step(), LanguageModel(), self.step)
            self.plan.finish(1.0)
            self.plan.sync.step(self.optimizer, 0.01)
        return self

    def save(self, run_dir: Path, options: CheckpointOptions = KEEP_ALL) -> Path:
        progress = Progress(self.step, self.loader.rows_consumed, 32 * self.step, self.loader.fingerprint)
        return checkpoint.save(run_dir, self.model, self.optimizer, progress, GROUP, options)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = dict(self.model.named_parameters())
        for name, parameter in self.model.named_parameters():
            found |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}


def assert_equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []
    assert [name for name in some if some[name].dtype != others[name].dtype] == []


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return stream_of(tmp_path / "data", random_tokens(400))


@pytest.mark.parametrize("options", [{}, {"tied": False, "norm": "rmsnorm", "positions": "rotary", "bias": False}])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path, stream: TokenStream, options: dict):
    trained = Training(stream, **options).run(3)
    folder = trained.save(tmp_path)
    other = Training(stream, seed=99, **options).run(1)
    checkpoint.load(folder, other.model, other.optimizer)
    assert_equal(trained.tensors(), other.tensors())
    weights_only = tiny_decoder(seed=98, **options)
    checkpoint.load(folder, weights_only)
    assert_equal(dict(trained.model.named_parameters()), dict(weights_only.named_parameters()))


@pytest.mark.parametrize("cut", [1, 4])
def test_a_run_cut_in_two_is_the_run_that_was_not(tmp_path: Path, stream: TokenStream, cut: int):
    """Weights, moments, dropout, rows: bit by bit, over the end of an epoch."""
    unbroken = Training(stream).run(20)
    folder = Training(stream).run(cut).save(tmp_path)
    torch.manual_seed(12345)  # another process
    resumed = Training(stream, seed=77)
    progress = read_progress(folder)
    checkpoint.load(folder, resumed.model, resumed.optimizer)
    resumed.step, resumed.loader.rows_consumed = progress.step, progress.rows_consumed
    resumed.run(20 - cut)
    assert_equal(unbroken.tensors(), resumed.tensors())
    fingerprint = (progress.fingerprint + resumed.loader.fingerprint) % (1 << 64)
    assert fingerprint == unbroken.loader.fingerprint
    assert unbroken.loader.epoch >= 1


def test_progress_survives(tmp_path: Path):
    progress = Progress(
        step=7,
        rows_consumed=2**40,
        tokens=2**50,
        fingerprint=2**64 - 1,
        best_val_loss=1.2345678901234567,
        identity={"seed": 1, "model.bias": True, "optim.lr": 1e-4, "data_digest": "é"},
        world_size=512,
        versions={"torch": "2.9"},
    )
    model = tiny_decoder()
    folder = checkpoint.save(tmp_path, model, make_optimizer(model, OptimOptions()), progress, GROUP, KEEP_ALL)
    assert folder == folder_of(tmp_path, 7) == tmp_path / "checkpoints" / "step-00000007"
    assert read_progress(folder) == progress
    assert newest_valid(tmp_path, GROUP) == (folder, progress, [])


def test_names_know_nothing_of_ranks_and_tied_weights_are_once(tmp_path: Path, stream: TokenStream):
    trained = Training(stream).run(1)
    folder = trained.save(tmp_path)
    assert {file.name for file in folder.iterdir()} == {"manifest.json", "part-00000-of-00001.safetensors"}
    with safe_open(folder / "part-00000-of-00001.safetensors", framework="pt") as file:
        names = set(file.keys())
    parameters = [name for name, _ in trained.model.named_parameters()]
    kinds = ("model", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert names == {f"{kind}.{name}" for kind in kinds for name in parameters}
    assert "model.head.weight" not in names


def test_names_that_end_alike():
    """``weight`` and ``inner.weight``: the state of one is not that of the other."""

    class Nested(nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), value))
            self.inner = nn.Linear(2, 2, bias=False)

    model, fresh = Nested(1.0), Nested(2.0)
    optimizer, other = make_optimizer(model, OptimOptions()), make_optimizer(fresh, OptimOptions())
    model.weight.grad, model.inner.weight.grad = torch.ones(2, 2), torch.full((2, 2), 5.0)
    optimizer.step()
    tensors = checkpoint._named_tensors(model, optimizer)
    for name, parameter in fresh.named_parameters():
        checkpoint._load_state(other, parameter, name, tensors)
    assert torch.equal(other.state[fresh.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(other.state[fresh.inner.weight]["exp_avg"], optimizer.state[model.inner.weight]["exp_avg"])
    assert set(other.state[fresh.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_an_unused_parameter_has_no_state_afterwards_either(tmp_path: Path):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    optimizer = make_optimizer(model, OptimOptions())
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    folder = checkpoint.save(tmp_path, model, optimizer, Progress(step=1), GROUP, KEEP_ALL)
    fresh = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    other = make_optimizer(fresh, OptimOptions())
    checkpoint.load(folder, fresh, other)
    assert [bool(other.state[p]) for p in fresh.parameters()] == [True, True, False, False]


def test_the_share_of_each_rank():
    """Every tensor has one rank; none has much more than another; more ranks than tensors is fine."""
    model = tiny_decoder(layers=4)
    optimizer = make_optimizer(model, OptimOptions())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    whole = checkpoint._named_tensors(model, optimizer)
    for size in (1, 2, 3, 8, 400):
        shares = []
        for rank in range(size):
            group = LocalGroup()
            group.rank, group.size = rank, size
            shares.append(checkpoint._share(model, optimizer, group))
        assert sorted(name for share in shares for name in share) == sorted(whole)
        loads = [sum(tensor.numel() * 4 for tensor in share.values()) for share in shares]
        assert max(loads) - min(loads) <= max(tensor.numel() * 4 for tensor in whole.values())
        if size <= 3:
            assert max(loads) < 1.001 * min(loads)


def test_another_model_is_refused(tmp_path: Path, stream: TokenStream):
    folder = Training(stream).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"embedding.weight needs shape \(50, 32\), found shape \(50, 16\)"):
        checkpoint.load(folder, tiny_decoder(width=32))
    with pytest.raises(CheckpointError, match=r"blocks.2.attention_norm.weight needs shape .*found no such tensor"):
        checkpoint.load(folder, tiny_decoder(layers=3))


def test_only_the_newest_are_kept(tmp_path: Path, stream: TokenStream):
    training = Training(stream)
    for _ in range(5):
        training.run(1).save(tmp_path, CheckpointOptions(keep_last=2))
    assert steps_saved(tmp_path) == [5, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    for _ in range(3):
        training.run(1).save(tmp_path, KEEP_ALL)
    assert steps_saved(tmp_path) == [8, 7, 6, 5, 4]


def test_steps_are_numbers_not_names(tmp_path: Path):
    for name in ("step-00000009", "step-100000000", "step-00000010", ".step-00000011.partial", "step-7", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert steps_saved(tmp_path) == [100_000_000, 10, 9]
    assert steps_saved(tmp_path / "nowhere") == []


def test_the_manifest_is_plain_json(tmp_path: Path, stream: TokenStream):
    fields = json.loads((Training(stream).run(2).save(tmp_path) / "manifest.json").read_text())
    assert (fields["step"], fields["rows_consumed"], fields["format"]) == (2, 8, 1)
    assert len(fields["fingerprint"]) == 16
