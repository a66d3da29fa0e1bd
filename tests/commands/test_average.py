"""The mean of the newest whole checkpoints: its values, what it skips and refuses, and that nothing is half-written."""

import errno
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import slices_of, tensors_in
from hypothesis import given
from hypothesis import strategies as st
from threads import on_ranks

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.retention import folder_of, steps_saved
from hvdtrain.checkpoint.valid import newest_valid, read_progress
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.group import Group
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.commands import average as averaging
from hvdtrain.commands.average import Average, average
from hvdtrain.config import RunConfig, dump_yaml
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_IO, EXIT_USAGE, CheckpointError, HvdtrainError

GROUP = LocalGroup()
ALONE = World()
KEEP_ALL = CheckpointOptions(keep_last=0)
Tensors = dict[str, torch.Tensor]


def weights_at(step: int, extra: float = 0.0) -> Tensors:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(3, 4, generator=generator) + extra,
        "model.b.bias": torch.full((2,), float(step)),
        "optimizer.exp_avg.a": torch.ones(3, 4),
        "ema.a": torch.full((3, 4), 100.0),
        "ema_began": torch.tensor(0),
    }


def save(run_dir: Path, step: int, tensors: Tensors | None = None, group: Group = GROUP, **progress) -> Path:
    where = Progress(step=step, tokens=96 * step, best_val_loss=1.0, identity={"seed": 1}, world_size=8, **progress)
    return writer.save(run_dir, slices_of(tensors or weights_at(step)), where, group, KEEP_ALL)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Five checkpoints of a run that keeps them all."""
    folder = tmp_path / "run"
    for step in (2, 4, 6, 8, 10):
        save(folder, step)
    (folder / "config.yaml").write_text(dump_yaml(RunConfig(checkpoint=KEEP_ALL)), encoding="utf-8")
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail(*words, exit_code: int) -> str:
    with pytest.raises(HvdtrainError) as caught:
        average(*words, ALONE)
    assert caught.value.exit_code == exit_code
    return str(caught.value)


def test_the_newest_are_averaged(run_dir: Path):
    before = files(run_dir)
    assert average(run_dir, 3, None, ALONE) == f"averaged the weights of steps 10, 8, 6 into {run_dir}/average-3"
    assert {path: raw for path, raw in files(run_dir).items() if path in before} == before
    made = run_dir / "average-3"
    assert {str(path.relative_to(made)) for path in files(made)} == {
        "config.yaml", "checkpoints/step-00000010/manifest.json",
        "checkpoints/step-00000010/part-00000-of-00001.safetensors",
    }  # fmt: skip
    assert (made / "config.yaml").read_bytes() == (run_dir / "config.yaml").read_bytes()
    folder, progress, damaged = newest_valid(made, GROUP)
    assert (progress.step, progress.tokens, progress.averaged_from, damaged) == (10, 960, (10, 8, 6), [])
    assert (progress.best_val_loss, progress.identity) == (None, {"seed": 1})
    found = tensors_in(folder, "")
    assert found.keys() == {"model.a", "model.b.bias"}
    truth = np.mean([weights_at(step)["model.a"].double().numpy() for step in (6, 8, 10)], axis=0)
    assert torch.equal(found["model.a"], torch.from_numpy(truth).float())
    assert found["model.b.bias"].tolist() == [8.0, 8.0]


def test_a_part_is_written_before_the_next_is_read(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """So the average of a model that is larger than the memory can be made."""
    seen = []
    read, write = Average.read, writer.write_part
    monkeypatch.setattr(averaging, "PART_BYTES", 16)
    monkeypatch.setattr(Average, "read", lambda self, name: seen.append(name) or read(self, name))
    monkeypatch.setattr(writer, "write_part", lambda *words: seen.append("written") or write(*words))
    average(run_dir, 2, None, ALONE)
    assert seen == ["model.a", "written", "model.b.bias", "written"]
    folder, _, _ = newest_valid(run_dir / "average-2", GROUP)
    assert len(list(folder.glob("part-*-of-00002.safetensors"))) == 2
    assert tensors_in(folder, "")["model.b.bias"].tolist() == [9.0, 9.0]


def test_of_one_it_is_that_one(run_dir: Path, tmp_path: Path):
    average(run_dir, 1, tmp_path / "deep" / "one", ALONE)
    found = tensors_in(folder_of(tmp_path / "deep" / "one", 10), "")
    assert all(torch.equal(found[name], weights_at(10)[name]) for name in ("model.a", "model.b.bias"))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_the_mean_is_rounded_once(tmp_path_factory: pytest.TempPathFactory, values: list[float]):
    """Against exact fractions: within half a unit of fp32's last place, and a little for the sum in fp64."""
    run_dir = tmp_path_factory.mktemp("mean")
    folders = [save(run_dir, n, {"model.a": torch.tensor([value])}) for n, value in enumerate(values)]
    exact = sum(map(Fraction, values)) / len(values)
    found = Average(folders).read("model.a")
    assert found.dtype == torch.float32
    largest = max(map(abs, values))
    bound = float(np.spacing(np.float32(abs(float(exact))))) / 2 * (1 + 1e-6) + largest * 1e-14
    assert abs(Fraction(found.item()) - exact) <= bound


def test_other_types_keep_theirs(tmp_path: Path):
    """1 + 1/128 is the next after 1 in bf16, and the mean, 1 + 0.6/128, is nearer to it; a sum in bf16 would give 1."""
    values = (1.0, 1.0, 1 + 1 / 128, 1 + 1 / 128, 1 + 1 / 128)
    folders = [save(tmp_path, n, {"model.a": torch.tensor([v]).bfloat16()}) for n, v in enumerate(values)]
    found = Average(folders).read("model.a")
    assert (found.dtype, found.item()) == (torch.bfloat16, 1 + 1 / 128)


def test_parts_of_any_number_of_ranks(tmp_path: Path):
    """One checkpoint of one rank, one of three: the tensors are found wherever they lie."""
    one = save(tmp_path, 1)
    three = on_ranks(3, lambda group: save(tmp_path, 2, group=group))[0]
    assert len(list(three.glob("part-*"))) == 3
    assert Average([one, three]).read("model.b.bias").tolist() == [1.5, 1.5]


# --- what is skipped and what is refused -------------------------------------------------------------------------


def test_damaged_ones_are_named_and_skipped(run_dir: Path, capfd: pytest.CaptureFixture):
    flip(folder_of(run_dir, 10) / "part-00000-of-00001.safetensors")
    (folder_of(run_dir, 6) / "manifest.json").unlink()
    assert average(run_dir, 3, None, ALONE).startswith("averaged the weights of steps 8, 4, 2 into")
    notes = capfd.readouterr().err.splitlines()
    assert [line.startswith("hvdtrain: note: damaged checkpoint skipped: ") for line in notes] == [True, True]
    assert "step-00000010/part-00000-of-00001.safetensors does not match its digest" in notes[0]
    assert "step-00000006/manifest.json" in notes[1]
    made = folder_of(run_dir / "average-3", 8)
    assert read_progress(made).averaged_from == (8, 4, 2)
    assert tensors_in(made, "model.b")["model.b.bias"].tolist() == pytest.approx([14 / 3] * 2)


def test_too_few_whole_ones(run_dir: Path):
    told = fail(run_dir, 6, None, exit_code=EXIT_USAGE)
    assert told == f"{run_dir} has 5 whole checkpoints (step 10, 8, 6, 4, 2), not --last 6; or give --last 5"
    flip(folder_of(run_dir, 4) / "part-00000-of-00001.safetensors")
    told = fail(run_dir, 5, None, exit_code=EXIT_USAGE)
    assert "4 whole checkpoints (step 10, 8, 6, 2), not --last 5; 1 more is damaged; or give --last 4" in told
    (run_dir / "config.yaml").write_text(dump_yaml(RunConfig()), encoding="utf-8")
    told = fail(run_dir, 5, None, exit_code=EXIT_USAGE)
    assert "the run keeps no more than checkpoint.keep_last=2: set it to 5 or 0 (all) for the next" in told
    assert not list(run_dir.glob("*average*"))


def test_no_whole_one(run_dir: Path, tmp_path: Path):
    for step in (2, 4, 6, 8, 10):
        flip(folder_of(run_dir, step) / "part-00000-of-00001.safetensors")
    assert "has no whole checkpoint to average" in fail(run_dir, 2, None, exit_code=EXIT_BAD_DATA)
    assert "is not a run folder" in fail(tmp_path / "nowhere", 2, None, exit_code=EXIT_BAD_DATA)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(run_dir: Path, tmp_path: Path, kind: str):
    out = tmp_path / "out"
    make = {"folder": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[kind]
    make()
    before = files(tmp_path)
    assert f"{out} is there already" in fail(run_dir, 2, out, exit_code=EXIT_USAGE)
    assert files(tmp_path) == before
    average(run_dir, 2, None, ALONE)
    assert "average-2 is there already" in fail(run_dir, 2, None, exit_code=EXIT_USAGE)


@pytest.mark.parametrize(
    "other",
    [
        {"model.a": torch.ones(4, 3), "model.b.bias": torch.ones(2)},
        {"model.a": torch.ones(3, 4).double(), "model.b.bias": torch.ones(2)},
        {"model.b.bias": torch.ones(2)},
        {**weights_at(4), "model.A": torch.ones(1)},
    ],
)
def test_of_two_models_there_is_no_mean(run_dir: Path, other: Tensors):
    save(run_dir, 12, other)
    told = fail(run_dir, 2, None, exit_code=EXIT_BAD_DATA)
    assert "step-00000010 is of another model than" in told
    assert "model.a is not the same" in told or "model.A is not the same" in told
    assert not (run_dir / "average-2").exists()


def test_an_average_is_not_averaged_again(run_dir: Path):
    average(run_dir, 2, None, ALONE)
    assert "is the average of steps 10, 8" in fail(run_dir / "average-2", 1, None, exit_code=EXIT_BAD_DATA)


def test_one_process_only(run_dir: Path):
    with pytest.raises(HvdtrainError, match="average works on one process; mpirun started 2"):
        average(run_dir, 2, None, World(0, 2, 0, 2, "mpirun"))


# --- writing that fails ------------------------------------------------------------------------------------------


def no_space(*_args, **_named) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILURES = ("hvdtrain.checkpoint.writer.save_file", "pathlib.Path.write_text", "pathlib.Path.mkdir", "shutil.copyfile")


@pytest.mark.parametrize("what", FAILURES)
def test_a_full_disk_leaves_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    before = files(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(what, no_space)
        assert "No space left" in fail(run_dir, 2, None, exit_code=EXIT_IO)
    assert files(run_dir) == before
    assert not list(run_dir.glob("*average*"))
    average(run_dir, 2, None, ALONE)


def test_what_a_killed_one_left_is_replaced(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed before the rename: no folder under the final name, and the next one does not mix with the rest."""
    stale = run_dir / ".average-2.partial" / "checkpoints" / "step-00000099"
    stale.mkdir(parents=True)
    average(run_dir, 2, None, ALONE)
    assert steps_saved(run_dir / "average-2") == [10]
    assert not stale.exists()

    def killed(*_args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(averaging.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        average(run_dir, 3, None, ALONE)
    assert not (run_dir / "average-3").exists()


def test_an_unreadable_part_is_one_message(run_dir: Path):
    (folder_of(run_dir, 10) / "part-00000-of-00001.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"cannot read .*step-00000010"):
        Average([folder_of(run_dir, 10)]).read("model.a")
