"""Checkpoints: every rank writes its part, any number of ranks reads them, one that fails leaves nothing behind."""

import errno
from pathlib import Path

import pytest
import torch
from checkpoints import averages_of, bytes_read, slices_of, state_of, tensors_in
from replicas import global_batch, make_plan, share
from tiny import tiny_decoder
from torch import nn

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import Checkpoint, load
from hvdtrain.checkpoint.valid import newest_valid
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.group import Group
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import EXIT_IO, RankError
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import Rect, Slice, whole_slices
from hvdtrain.tasks.lm import LanguageModel

OPTIONS = CheckpointOptions(keep_last=2)


class Trained:
    """A model and an optimizer with two steps behind them, equal on all ranks."""

    def __init__(self, group: Group):
        self.group = group
        self.model, plan = make_plan(group)
        self.optimizer = make_optimizer(self.model.parameters(), OptimOptions())
        for step in (1, 2):
            plan.forward_backward(share(global_batch(step), group, passes=1), LanguageModel(), step)
            plan.finish(max_norm=1.0)
            plan.step(self.optimizer, lr=0.01)
        plan.sync.close()

    def progress(self, step: int) -> Progress:
        return Progress(step, 12 * step, 96 * step, (1 << 64) - step, 3.5, {"seed": 1}, self.group.size, {"torch": "2"})

    def save(self, run_dir: Path, step: int) -> Path:
        return writer.save(run_dir, state_of(self.model, self.optimizer), self.progress(step), self.group, OPTIONS)


@pytest.fixture
def trained(group: HorovodGroup) -> Trained:
    return Trained(group)


def _load(folder: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = tiny_decoder(seed=99)
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    load(folder, whole_slices(model, LocalGroup()), optimizer)
    return model, optimizer


def _assert_equal(trained: Trained, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for (name, saved), loaded in zip(trained.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(saved, loaded), name
        for key, value in trained.optimizer.state[saved].items():
            assert torch.equal(value, optimizer.state[loaded][key]), (name, key)
        assert set(optimizer.state[loaded]) == {"step", "exp_avg", "exp_avg_sq"}


def _left_over(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_what_was_saved_is_loaded(group: HorovodGroup, trained: Trained, folder: Path):
    path = trained.save(folder, step=200)
    parts = [f"part-{rank:05d}-of-{group.size:05d}.safetensors" for rank in range(group.size)]
    assert path == folder / "checkpoints" / "step-00000200"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", *parts]
    sizes = [(path / part).stat().st_size for part in parts]
    assert max(sizes) < 2 * min(sizes)  # each rank its share
    found, progress, damaged = newest_valid(folder, group)
    assert (found, progress, damaged) == (path, trained.progress(200), [])
    _assert_equal(trained, *_load(found))


def test_one_process_reads_the_parts_of_all(group: HorovodGroup, trained: Trained, folder: Path):
    trained.save(folder, step=200)
    found, progress, _ = newest_valid(folder, LocalGroup())
    assert progress == trained.progress(200)
    _assert_equal(trained, *_load(found))


def test_all_ranks_read_the_part_of_one_process(group: HorovodGroup, folder: Path):
    if group.rank == 0:
        Trained(LocalGroup()).save(folder, step=200)
    group.barrier()
    found, progress, _ = newest_valid(folder, group)
    assert progress.world_size == 1
    _assert_equal(Trained(LocalGroup()), *_load(found))


def test_each_byte_is_read_once_by_each_rank_that_needs_it(
    group: HorovodGroup, trained: Trained, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """All of it by ranks that hold the whole model; a share by ranks that hold one."""
    path = trained.save(folder, step=200)
    sizes = {p.name: p.tensor.numel() * p.tensor.element_size() for p in state_of(trained.model, trained.optimizer)}
    counted = bytes_read(monkeypatch)
    _load(path)
    assert sorted(size for size in counted.values()) == sorted(sizes.values())
    assert {key for _, key, _ in counted} == sizes.keys()

    counted.clear()
    saved, name = Checkpoint(path), "model.embedding.weight"
    rows, width = saved.whole(name)[0]
    first, last = (rows * at // group.size for at in (group.rank, group.rank + 1))
    mine = saved.read(name, [Rect((first, 0), (last - first, width))])
    assert torch.equal(mine, trained.model.embedding.weight[first:last])
    assert sum(counted.values()) == 4 * mine.numel()
    assert sum(group.all_gather_object(sum(counted.values()))) == sizes[name]


def test_a_model_that_ranks_hold_in_pieces(group: HorovodGroup, folder: Path):
    """Each writes its rows, one of them what all hold; all read everything."""
    whole = torch.arange(24.0).reshape(8, 3)
    first, last = (8 * at // group.size for at in (group.rank, group.rank + 1))
    place = Rect((first, 0), (last - first, 3))
    state = [
        Slice("model.cut", whole[first:last], whole.shape, (place,), group),
        *slices_of({"model.x": torch.ones(2)}),
    ]
    path = writer.save(folder, state, Progress(1, world_size=group.size), group, OPTIONS)
    assert newest_valid(folder, group)[0] == path
    found = tensors_in(path)
    assert torch.equal(found["model.cut"], whole)
    assert torch.equal(found["model.x"], torch.ones(2))


def test_a_rank_that_cannot_write_is_an_error_on_all(
    group: HorovodGroup, trained: Trained, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """As with a full disk on one node: every rank stops with the reason, and what was saved before stays."""
    before, last = trained.save(folder, step=100), group.size - 1

    def disk_full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if group.rank == last:
            patched.setattr(writer, "save_file", disk_full)
        with pytest.raises(RankError) as caught:
            trained.save(folder, step=200)
    reason = "No space left on device" + (f" (on rank {last})" if last else "")
    assert str(caught.value) == f"OutputError: cannot save {before.with_name('step-00000200')}: {reason}"
    assert caught.value.exit_code == EXIT_IO
    group.barrier()  # rank 0 clears up
    assert _left_over(folder) == ["step-00000100"]
    assert newest_valid(folder, group)[0] == before
    group.barrier()
    assert trained.save(folder, step=200).exists()  # with room again, the same step is saved


def test_a_part_that_one_rank_finds_damaged_is_skipped_by_all(group: HorovodGroup, trained: Trained, folder: Path):
    older, newer = trained.save(folder, step=100), trained.save(folder, step=200)
    part = newer / f"part-{group.size - 1:05d}-of-{group.size:05d}.safetensors"
    group.barrier()
    if group.rank == 0:
        raw = bytearray(part.read_bytes())
        raw[-1] ^= 1
        part.write_bytes(raw)
    group.barrier()
    damage = [f"{part} does not match its digest"]
    assert newest_valid(folder, group) == (older, trained.progress(100), damage)


def test_only_the_newest_are_kept(group: HorovodGroup, trained: Trained, folder: Path):
    for step in (100, 200, 300):
        trained.save(folder, step)
    assert _left_over(folder) == ["step-00000200", "step-00000300"]


# --- averaged weights --------------------------------------------------------------------------------------------


class Averaging(Trained):
    """The same with an average of the weights, which every rank keeps for itself."""

    def __init__(self, group: Group):
        super().__init__(group)
        self.ema = Ema(whole_slices(self.model, LocalGroup()), EmaOptions(decay=0.9))
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                parameter.mul_(1.0 + number / 7)
        self.ema.update(1)

    def save(self, run_dir: Path, step: int) -> Path:
        return writer.save(
            run_dir,
            state_of(self.model, self.optimizer, self.ema),
            self.progress(step),
            self.group,
            OPTIONS,
        )


def test_an_average_is_resumed_on_any_ranks(group: HorovodGroup, folder: Path):
    """Saved by all and read by each; saved by one and read by all. Bit for bit, also after further updates."""
    for saver, run_dir in ((group, folder / "all"), (LocalGroup(), folder / "one")):
        saved = Averaging(saver)
        if saver is group or group.rank == 0:
            path = saved.save(run_dir, step=200)
            sizes = [part.stat().st_size for part in path.glob("part-*")]
            assert len(sizes) == saver.size
            assert max(sizes) < 2 * min(sizes)
        group.barrier()
        found, _, _ = newest_valid(run_dir, group)
        model = tiny_decoder(seed=99)
        optimizer, ema = (
            make_optimizer(model.parameters(), OptimOptions()),
            Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9)),
        )
        load(found, whole_slices(model, LocalGroup()), optimizer, ema)
        _assert_equal(saved, model, optimizer)
        for one in (saved.ema, ema):
            one.update(201)
        assert ema.began == 0
        for name, average in averages_of(saved.ema).items():
            assert torch.equal(average, averages_of(ema)[name]), name
        with ema.swapped():
            own = [average.detach().double().sum().item() for average in model.parameters()]
        if saver is group:
            group.agree(own, "the averaged weights")
