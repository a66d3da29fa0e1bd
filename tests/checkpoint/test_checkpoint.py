"""Checkpoints: what is saved is loaded to the bit, and a run that was cut in two is the run that was not."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from checkpoints import assert_equal, averages_of, copies_of, slices_of, state_of, tensors_in
from in_halves import InHalves
from safetensors import safe_open
from threads import Scripted
from tiny import CPU, random_tokens, stream_of, tiny_decoder
from torch import nn

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import _WHERE_SET, Progress, check_resumable
from hvdtrain.checkpoint.reader import Checkpoint, load
from hvdtrain.checkpoint.retention import Score, best_of, folder_of, read_best, steps_saved
from hvdtrain.checkpoint.valid import choose_valid, newest_valid, read_progress
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import WindowSource
from hvdtrain.errors import CheckpointError, RankError
from hvdtrain.files import fields_sha256
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import whole_slices
from hvdtrain.sync import SyncOptions
from hvdtrain.tasks.lm import LanguageModel

GROUP = LocalGroup()
KEEP_ALL = CheckpointOptions(keep_last=0)


class Training:
    """A model with dropout on its way: what train.py keeps together."""

    def __init__(self, stream: TokenStream, seed: int = 0, **options):
        self.model = tiny_decoder(seed, dropout=0.2, **options).train()
        self.optimizer = make_optimizer(self.model.parameters(), OptimOptions())
        self.plan = InHalves(self.model, GROUP, SyncOptions(), "fp32", seed=5)
        source = WindowSource(stream, WindowSampler(len(stream), 8, seed=5), Feed(8, 5, 4, microbatch=2))
        self.loader = TrainLoader(source, CPU)
        self.step = 0

    def run(self, steps: int) -> "Training":
        for self.step in range(self.step + 1, self.step + steps + 1):  # noqa: B020
            self.plan.forward_backward(self.loader.next_step(), LanguageModel(), self.step)
            self.plan.finish(1.0)
            self.plan.step(self.optimizer, 0.01)
        return self

    def save(self, run_dir: Path, options: CheckpointOptions = KEEP_ALL) -> Path:
        progress = Progress(self.step, self.loader.rows_consumed, 32 * self.step, self.loader.fingerprint)
        return writer.save(run_dir, state_of(self.model, self.optimizer), progress, GROUP, options)

    def tensors(self) -> dict[str, torch.Tensor]:
        return copies_of(self.model, self.optimizer)


@pytest.fixture
def stream(tmp_path: Path) -> TokenStream:
    return stream_of(tmp_path / "data", random_tokens(400))


@pytest.mark.parametrize("options", [{}, {"tied": False, "norm": "rmsnorm", "positions": "rotary", "bias": False}])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path: Path, stream: TokenStream, options: dict):
    trained = Training(stream, **options).run(3)
    folder = trained.save(tmp_path)
    other = Training(stream, seed=99, **options).run(1)
    load(folder, whole_slices(other.model, GROUP), other.optimizer)
    assert_equal(trained.tensors(), other.tensors())
    weights_only = tiny_decoder(seed=98, **options)
    load(folder, whole_slices(weights_only, GROUP))
    assert_equal(dict(trained.model.named_parameters()), dict(weights_only.named_parameters()))


@pytest.mark.parametrize("cut", [1, 4])
def test_a_run_cut_in_two_is_the_run_that_was_not(tmp_path: Path, stream: TokenStream, cut: int):
    """Weights, moments, dropout, rows: bit by bit, over the end of an epoch."""
    unbroken = Training(stream).run(20)
    folder = Training(stream).run(cut).save(tmp_path)
    torch.manual_seed(12345)  # another process
    resumed = Training(stream, seed=77)
    progress = read_progress(folder)
    load(folder, whole_slices(resumed.model, GROUP), resumed.optimizer)
    resumed.step, resumed.loader.rows_consumed = progress.step, progress.rows_consumed
    resumed.run(20 - cut)
    assert_equal(unbroken.tensors(), resumed.tensors())
    fingerprint = (progress.fingerprint + resumed.loader.fingerprint) % (1 << 64)
    assert fingerprint == unbroken.loader.fingerprint
    assert unbroken.loader.epoch >= 1


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, stream: TokenStream):
    """safetensors writes files that only their owner can read; a group shares its runs."""
    folder = Training(stream).run(1).save(tmp_path)
    assert {path.stat().st_mode for path in folder.iterdir()} == {(folder / "manifest.json").stat().st_mode}


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
    folder = writer.save(
        tmp_path, state_of(model, make_optimizer(model.parameters(), OptimOptions())), progress, GROUP, KEEP_ALL
    )
    assert folder == folder_of(tmp_path, 7) == tmp_path / "checkpoints" / "step-00000007"
    assert read_progress(folder) == progress
    assert newest_valid(tmp_path, GROUP) == (folder, progress, [])
    averaged = replace(progress, averaged_from=(7, 6, 5))
    writer.save(tmp_path / "other", slices_of({"model.x": torch.ones(1)}), averaged, GROUP, KEEP_ALL)
    assert read_progress(folder_of(tmp_path / "other", 7)) == averaged


def test_a_loss_that_is_no_number_is_no_best(tmp_path: Path):
    for step, loss in enumerate((math.nan, math.inf), start=1):
        folder = writer.save(
            tmp_path, slices_of({"model.x": torch.ones(1)}), Progress(step=step, best_val_loss=loss), GROUP, KEEP_ALL
        )
        assert read_progress(folder) == Progress(step=step)


def rewrite_manifest(folder: Path, keep: set[str]) -> None:
    """As a version of hvdtrain would have written it that knew only the fields ``keep`` of Progress."""
    path = folder / "manifest.json"
    unknown = {field.name for field in fields(Progress)} - keep
    found = {k: v for k, v in json.loads(path.read_text()).items() if k not in unknown and k != "manifest_sha256"}
    path.write_text(json.dumps({**found, "manifest_sha256": fields_sha256(found)}))


def test_what_an_older_manifest_lacks_has_its_default(tmp_path: Path):
    model = tiny_decoder()
    progress = Progress(3, 12, 96, 5, 1.5, {"seed": 1}, 4, {"torch": "2"})
    folder = writer.save(
        tmp_path, state_of(model, make_optimizer(model.parameters(), OptimOptions())), progress, GROUP, KEEP_ALL
    )
    rewrite_manifest(folder, {"step", "rows_consumed", "fingerprint"})
    assert read_progress(folder) == Progress(step=3, rows_consumed=12, fingerprint=5)


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


def test_names_that_end_alike(tmp_path: Path):
    """``weight`` and ``inner.weight``: the state of one is not that of the other."""

    class Nested(nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), value))
            self.inner = nn.Linear(2, 2, bias=False)

    model, fresh = Nested(1.0), Nested(2.0)
    optimizer, other = (
        make_optimizer(model.parameters(), OptimOptions()),
        make_optimizer(fresh.parameters(), OptimOptions()),
    )
    model.weight.grad, model.inner.weight.grad = torch.ones(2, 2), torch.full((2, 2), 5.0)
    optimizer.step()
    folder = writer.save(tmp_path, state_of(model, optimizer), Progress(step=1), GROUP, KEEP_ALL)
    load(folder, whole_slices(fresh, GROUP), other)
    assert torch.equal(other.state[fresh.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(other.state[fresh.inner.weight]["exp_avg"], optimizer.state[model.inner.weight]["exp_avg"])
    assert set(other.state[fresh.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_an_unused_parameter_has_no_state_afterwards_either(tmp_path: Path):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    folder = writer.save(tmp_path, state_of(model, optimizer), Progress(step=1), GROUP, KEEP_ALL)
    fresh = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    other = make_optimizer(fresh.parameters(), OptimOptions())
    load(folder, whole_slices(fresh, GROUP), other)
    assert [bool(other.state[p]) for p in fresh.parameters()] == [True, True, False, False]


def test_the_share_of_each_rank():
    """Every tensor has one rank; none has much more than another; more ranks than tensors is fine."""
    model = tiny_decoder(layers=4)
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    whole = state_of(model, optimizer)
    for size in (1, 2, 3, 8, 400):
        ranks = [Scripted(rank, size, lambda value, size=size: [value] * size) for rank in range(size)]
        shares = [writer.share(whole, group) for group in ranks]
        assert sorted(piece.name for share in shares for piece in share) == sorted(piece.name for piece in whole)
        loads = [sum(piece.tensor.numel() * 4 for piece in share) for share in shares]
        assert max(loads) - min(loads) <= max(piece.tensor.numel() * 4 for piece in whole)
        if size <= 3:
            assert max(loads) < 1.001 * min(loads)


def test_another_model_is_refused(tmp_path: Path, stream: TokenStream):
    folder = Training(stream).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"embedding.weight needs shape \(50, 32\), found shape \(50, 16\)"):
        load(folder, whole_slices(tiny_decoder(width=32), GROUP))
    with pytest.raises(CheckpointError, match=r"blocks.2.attention_norm.weight needs shape .*found no such tensor"):
        load(folder, whole_slices(tiny_decoder(layers=3), GROUP))


def test_only_the_newest_are_kept(tmp_path: Path, stream: TokenStream):
    training = Training(stream)
    for _ in range(5):
        training.run(1).save(tmp_path, CheckpointOptions(keep_last=2))
    assert steps_saved(tmp_path) == [5, 4]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]
    for _ in range(3):
        training.run(1).save(tmp_path, KEEP_ALL)
    assert steps_saved(tmp_path) == [8, 7, 6, 5, 4]


def test_some_are_kept_for_ever(tmp_path: Path):
    options = CheckpointOptions(keep_last=1, keep_every=3)
    for step in range(1, 9):
        save_step(tmp_path, step, options)
    assert steps_saved(tmp_path) == [8, 6, 3]


def save_step(run_dir: Path, step: int, options: CheckpointOptions, val_loss: float | None = None) -> None:
    tensors = {"model.x": torch.full((1,), float(step))}
    score = None if val_loss is None else Score(options.best, val_loss, 1 if options.best == "bleu" else -1)
    writer.save(run_dir, slices_of(tensors), Progress(step=step), GROUP, options, score)


def test_the_best_is_kept_beside_the_newest(tmp_path: Path):
    options = CheckpointOptions(keep_last=1, keep_best=True)
    kept = []
    for step, val_loss in enumerate((4.0, 3.0, None, math.nan, 3.5, 2.0, math.inf, 2.0, 7.0), start=1):
        save_step(tmp_path, step, options, val_loss)
        kept.append(steps_saved(tmp_path))
    assert kept == [[1], [2], [3, 2], [4, 2], [5, 2], [6], [7, 6], [8, 6], [9, 6]]
    pointer = tmp_path / "checkpoints" / "best.json"
    assert json.loads(pointer.read_text()) == {"step": 6, "val_loss": 2.0}
    assert {path.name for path in pointer.parent.iterdir()} == {"step-00000006", "step-00000009", "best.json"}
    save_step(tmp_path, 10, CheckpointOptions(keep_last=1), 1.0)
    assert steps_saved(tmp_path) == [10]  # nobody asks for it any more
    assert json.loads(pointer.read_text())["step"] == 6


def test_more_may_be_better_and_another_score_begins_anew(tmp_path: Path):
    options = CheckpointOptions(keep_last=1, keep_best=True, best="bleu")
    for step, bleu in enumerate((10.0, 30.0, math.nan, 20.0), start=1):
        save_step(tmp_path, step, options, bleu)
    assert (steps_saved(tmp_path), read_best(tmp_path), best_of(tmp_path, "val_loss")) == ([4, 2], (2, 30.0), None)
    save_step(tmp_path, 5, CheckpointOptions(keep_last=1, keep_best=True), 4.0)
    assert (steps_saved(tmp_path), best_of(tmp_path, "val_loss"), best_of(tmp_path, "bleu")) == ([5], 4.0, None)


def test_one_may_be_asked_for(tmp_path: Path):
    options = CheckpointOptions(keep_last=2, keep_best=True)
    for step, val_loss in enumerate((4.0, 3.0, 3.5, 3.6), start=1):
        save_step(tmp_path, step, options, val_loss)
    for which, step in (("newest", 4), ("best", 2), ("3", 3), ("0003", 3)):
        folder, progress = choose_valid(tmp_path, which, LocalGroup())
        assert (folder, progress.step) == (folder_of(tmp_path, step), step)
    there = "no checkpoint of step 7; there: 2, 3, 4"
    for which, message in (("7", there), ("../3", "give newest, best or"), ("²", "give newest"), ("", "give newest")):
        with pytest.raises(RankError, match=message) as caught:
            choose_valid(tmp_path, which, LocalGroup())
        assert caught.value.exit_code == 2
    (folder_of(tmp_path, 2) / "manifest.json").write_text("{")
    with pytest.raises(RankError, match="step-00000002"):  # another one would not be what was asked for
        choose_valid(tmp_path, "best", LocalGroup())
    (tmp_path / "checkpoints/best.json").unlink()
    with pytest.raises(RankError, match=r"no best checkpoint: checkpoint\.keep_best was off"):
        choose_valid(tmp_path, "best", LocalGroup())
    assert choose_valid(tmp_path / "empty", "newest", LocalGroup()) is None


NOWHERE = [
    "",
    "[1]",
    "{}",
    "[" * 10_000,
    '{"step": 9, "val_loss": 1.0}',
    '{"step": 5, "val_loss": NaN}',
    '{"step": true, "val_loss": 1.0}',
    '{"step": "../5", "val_loss": 1.0}',
    '{"step": -1, "val_loss": 1.0}',
]


@pytest.mark.parametrize("text", NOWHERE)
def test_a_pointer_that_leads_nowhere_is_none(tmp_path: Path, text: str):
    options = CheckpointOptions(keep_last=1, keep_best=True)
    save_step(tmp_path, 5, options, 3.0)
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    assert best_of(tmp_path, "val_loss") is None
    save_step(tmp_path, 6, options, 4.0)
    assert (steps_saved(tmp_path), best_of(tmp_path, "val_loss")) == ([6], 4.0)


def test_steps_are_numbers_not_names(tmp_path: Path):
    for name in ("step-00000009", "step-100000000", "step-00000010", ".step-00000011.partial", "step-7", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert steps_saved(tmp_path) == [100_000_000, 10, 9]
    assert steps_saved(tmp_path / "nowhere") == []


def test_the_manifest_is_plain_json(tmp_path: Path, stream: TokenStream):
    found = json.loads((Training(stream).run(2).save(tmp_path) / "manifest.json").read_text())
    assert (found["step"], found["rows_consumed"], found["format"]) == (2, 8, 2)
    assert len(found["fingerprint"]) == 16


# --- averaged weights --------------------------------------------------------------------------------------------

EMA = EmaOptions(decay=0.9)


class Averaging(Training):
    """The same with an average at its side."""

    def __init__(self, stream: TokenStream, seed: int = 0, options: EmaOptions = EMA, **more):
        super().__init__(stream, seed, **more)
        self.ema = Ema(whole_slices(self.model, LocalGroup()), options)

    def run(self, steps: int) -> "Averaging":
        for _ in range(steps):
            super().run(1)
            self.ema.update(self.step)
        return self

    def save(self, run_dir: Path, options: CheckpointOptions = KEEP_ALL) -> Path:
        progress = Progress(self.step, self.loader.rows_consumed)
        return writer.save(run_dir, state_of(self.model, self.optimizer, self.ema), progress, GROUP, options)

    def resume(self, folder: Path) -> "Averaging":
        progress = read_progress(folder)
        load(folder, whole_slices(self.model, GROUP), self.optimizer, self.ema)
        self.step, self.loader.rows_consumed = progress.step, progress.rows_consumed
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        averages = {f"ema.{name}": t.clone() for name, t in averages_of(self.ema).items()}
        return {**super().tensors(), **averages}


def test_an_average_is_saved_beside_the_weights_and_only_then(tmp_path: Path, stream: TokenStream):
    training = Averaging(stream).run(3)
    found, plain = tensors_in(training.save(tmp_path / "ema")), tensors_in(Training(stream).run(3).save(tmp_path))
    names = [name for name, _ in training.model.named_parameters()]
    assert found.keys() - plain.keys() == {"ema_began", *(f"ema.{name}" for name in names)}
    assert plain.keys() <= found.keys()
    assert_equal(plain, {name: found[name] for name in plain})  # an average changes nothing else
    assert all(torch.equal(found[f"ema.{n}"], average) for n, average in averages_of(training.ema).items())
    assert not torch.equal(found["ema.embedding.weight"], found["model.embedding.weight"])
    manifests = [json.loads((folder_of(run, 3) / "manifest.json").read_text()) for run in (tmp_path, tmp_path / "ema")]
    before = {field.name for field in fields(Progress)} - _WHERE_SET | {"format", "parts", "manifest_sha256"}
    assert [manifest.keys() == before for manifest in manifests] == [True, True]


@pytest.mark.parametrize("cut", [1, 4, 5])
@pytest.mark.parametrize("options", [EMA, EmaOptions(decay=0.5, every=2, warmup=False)])
def test_an_average_cut_in_two_is_the_one_that_was_not(tmp_path: Path, stream: TokenStream, cut: int, options):
    unbroken = Averaging(stream, options=options).run(8)
    folder = Averaging(stream, options=options).run(cut).save(tmp_path)
    assert_equal(Averaging(stream, 7, options).resume(folder).run(8 - cut).tensors(), unbroken.tensors())


def test_a_run_that_takes_up_averaging_begins_with_the_weights_it_loads(tmp_path: Path, stream: TokenStream):
    """And its warm-up with them, also when it is cut once more afterwards."""
    folder = Training(stream).run(6).save(tmp_path / "plain")
    begun = Averaging(stream, seed=3).resume(folder)
    assert begun.ema.began == 6
    assert_equal(dict(begun.model.named_parameters()), dict(averages_of(begun.ema)))
    again = Averaging(stream, seed=4).resume(begun.run(1).save(tmp_path / "begun"))
    assert again.ema.began == 6
    begun.run(2)
    assert_equal(again.run(2).tensors(), begun.tensors())
    by_hand = Averaging(stream, seed=5).resume(folder)
    average = by_hand.model.norm.weight.detach().clone()
    for t in (1, 2, 3):
        by_hand.run(1)
        average.lerp_(by_hand.model.norm.weight.detach(), 1 - (1 + t) / (10 + t))
    assert torch.equal(average, averages_of(begun.ema)["norm.weight"])


def test_a_run_without_averaging_goes_on_from_one_with(tmp_path: Path, stream: TokenStream):
    folder = Averaging(stream).run(3).save(tmp_path)
    resumed, plain = Training(stream, seed=9), Training(stream).run(3)
    load(folder, whole_slices(resumed.model, GROUP), resumed.optimizer)
    assert_equal(resumed.tensors(), plain.tensors())
    assert not any(name.startswith("ema") for name in tensors_in(resumed.save(tmp_path / "next")))


def test_a_parameter_that_was_frozen_has_its_own_value_as_average(tmp_path: Path):
    frozen, thawed = tiny_decoder(0), tiny_decoder(1)
    frozen.position.weight.requires_grad_(False)
    optimizer, ema = make_optimizer(frozen.parameters(), OptimOptions()), Ema(whole_slices(frozen, LocalGroup()), EMA)
    nn.init.normal_(frozen.norm.weight)
    folder = writer.save(tmp_path, state_of(frozen, optimizer, ema), Progress(step=1), GROUP, KEEP_ALL)
    other = Ema(whole_slices(thawed, LocalGroup()), EMA)
    load(folder, whole_slices(thawed, GROUP), ema=other)
    assert torch.equal(averages_of(other)["position.weight"], frozen.position.weight)
    assert torch.equal(averages_of(other)["norm.weight"], averages_of(ema)["norm.weight"])
    load(folder, whole_slices(thawed, GROUP), weights="ema")
    assert torch.equal(thawed.position.weight, frozen.position.weight)
    assert torch.equal(thawed.norm.weight, averages_of(ema)["norm.weight"])
    load(folder, whole_slices(thawed, GROUP))
    assert torch.equal(thawed.norm.weight, frozen.norm.weight)


def test_weights_to_look_at(tmp_path: Path, stream: TokenStream):
    with_ema, without = Averaging(stream).run(3), Training(stream).run(3)
    folder, plain = with_ema.save(tmp_path / "ema"), without.save(tmp_path / "plain")
    assert [Checkpoint(folder).has_ema, Checkpoint(plain).has_ema] == [True, False]
    looked = tiny_decoder(9)
    load(folder, whole_slices(looked, GROUP), weights="ema")
    assert_equal(dict(looked.named_parameters()), dict(averages_of(with_ema.ema)))
    with pytest.raises(CheckpointError, match="step-00000003 has no averaged weights"):
        load(plain, whole_slices(looked, GROUP), weights="ema")


def test_training_does_not_go_on_from_an_average_of_checkpoints(tmp_path: Path):
    model = tiny_decoder()
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    progress = Progress(step=6, averaged_from=(6, 4))
    folder = writer.save(tmp_path, slices_of(tensors), progress, GROUP, KEEP_ALL)
    other = tiny_decoder(5)
    load(folder, whole_slices(other, GROUP))
    assert_equal(dict(model.named_parameters()), dict(other.named_parameters()))
    for refuse in (
        lambda f: check_resumable(f, read_progress(f)),
        lambda f: load(f, whole_slices(other, GROUP), make_optimizer(other.parameters(), OptimOptions())),
    ):
        with pytest.raises(
            CheckpointError, match=r"is the average of steps 6, 4, without optimizer state: evaluate and"
        ):
            refuse(folder)
