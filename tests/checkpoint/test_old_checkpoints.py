"""Checkpoints of format 1 load as they did: ``old/`` was written by the last hvdtrain that knew no other.

That was a tiny decoder after three steps of AdamW with averaged weights, by two ranks. The numbers below are what that
hvdtrain then found in it: to the bit where bytes are only copied, to a few units of fp32 where something is computed.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import averages_of, state_of, tensors_in
from tiny import loss_of, tiny_decoder
from torch import nn

from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import Checkpoint, load
from hvdtrain.checkpoint.retention import folder_of
from hvdtrain.checkpoint.valid import newest_valid, read_progress
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.commands.average import Average
from hvdtrain.data.batch import Batch
from hvdtrain.errors import CheckpointError
from hvdtrain.files import fields_sha256
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import whole_slices
from hvdtrain.tasks.lm import LanguageModel

GROUP = LocalGroup()
OLD = folder_of(Path(__file__).parent / "old", 3)
DIGEST = "a1291184009464b3afdea030c6651617a25e4e80d036fe152eb23d1f817e60e8"
NEAR = 1e-6


def decoder() -> nn.Module:
    return tiny_decoder(seed=8, layers=1, width=8, heads=2)


def batch(step: int) -> Batch:
    tokens = (torch.arange(4 * 9).reshape(4, 9) * 7 + step) % 50
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), 32)


@torch.no_grad()
def mean_loss(model: nn.Module) -> float:
    loss = loss_of(LanguageModel(), model.eval(), batch(9))
    return float(loss.total) / loss.weight


def size_of(tensors) -> float:
    return sum(tensor.detach().double().abs().sum().item() for tensor in tensors)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def test_where_the_run_stands():
    expected = Progress(
        3, 12, 96, 2**64 - 3, 3.5, {"seed": 1}, 2, {"torch": "2"}, None, None, (1.0, 2.0), None, run_steps=10
    )
    assert read_progress(OLD) == expected
    assert newest_valid(OLD.parents[1], GROUP) == (OLD, expected, [])


def test_every_bit_is_there():
    assert digest(tensors_in(OLD)) == DIGEST


def test_it_is_evaluated():
    model = decoder()
    load(OLD, whole_slices(model, GROUP))
    assert mean_loss(model) == pytest.approx(3.862466335296631, rel=NEAR)
    load(OLD, whole_slices(model, GROUP), weights="ema")
    assert mean_loss(model) == pytest.approx(3.866668939590454, rel=NEAR)


def test_training_goes_on_from_it():
    model = decoder()
    optimizer, ema = (
        make_optimizer(model.parameters(), OptimOptions(lr=0.01)),
        Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9)),
    )
    load(OLD, whole_slices(model, GROUP), optimizer, ema)
    assert digest({piece.name: piece.tensor for piece in state_of(model, optimizer, ema)}) == DIGEST
    loss = loss_of(LanguageModel(), model, batch(4))
    (loss.total / loss.weight).backward()
    optimizer.step()
    ema.update(4)
    assert mean_loss(model) == pytest.approx(3.8522567749023438, rel=NEAR)
    assert size_of(model.parameters()) == pytest.approx(49.38745714908282, rel=NEAR)
    assert size_of(averages_of(ema).values()) == pytest.approx(47.817753127327194, rel=NEAR)


def test_it_is_averaged():
    mean = Average([OLD, OLD])
    assert set(mean) == {name for name in Checkpoint(OLD) if name.startswith("model.")}
    assert all(torch.equal(mean.read(name), tensor) for name, tensor in tensors_in(OLD, "model.").items())


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path):
    """Its manifest does not say what a part holds; only the parts themselves do."""
    folder = shutil.copytree(OLD, folder_of(tmp_path, 3))
    one, two = sorted(folder.glob("part-*"))
    shutil.copy(one, two)
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    fields.pop("manifest_sha256")
    fields["parts"][1] |= {key: fields["parts"][0][key] for key in ("bytes", "sha256")}
    path.write_text(json.dumps({**fields, "manifest_sha256": fields_sha256(fields)}))
    assert read_progress(folder).step == 3
    with pytest.raises(CheckpointError, match=f"{two.name} holds .*, which another part holds too"):
        load(folder, whole_slices(decoder(), GROUP))
