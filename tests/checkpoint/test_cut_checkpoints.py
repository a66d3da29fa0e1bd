"""Checkpoints of tensors that ranks hold in pieces: written once each, read in any other pieces."""

import json
import random
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
from checkpoints import bytes_read, slices_of, tensors_in
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import snapshot
from safetensors import safe_open
from test_slices import cut
from threads import on_ranks
from torch import nn

from hvdtrain.checkpoint import reader, writer
from hvdtrain.checkpoint.manifest import Progress, key_of, kind_of, parse_stored
from hvdtrain.checkpoint.reader import Checkpoint, load
from hvdtrain.checkpoint.state import run_state
from hvdtrain.checkpoint.valid import read_progress
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.errors import CheckpointError
from hvdtrain.files import fields_sha256
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import Rect, Slice, whole_rect, whole_slice, whole_slices

ALONE = LocalGroup()
KEEP_ALL = CheckpointOptions(keep_last=0)
EMA = EmaOptions(decay=0.9)


def taken(whole: torch.Tensor, rect: Rect) -> torch.Tensor:
    return whole[rect.index_in(whole_rect(whole.shape))]


def piece_of(name: str, whole: torch.Tensor, rects: Sequence[Rect]) -> Slice:
    return Slice(name, torch.cat([taken(whole, rect) for rect in rects]), whole.shape, tuple(rects), ALONE)


def rows(whole: torch.Tensor, rank: int, size: int) -> Rect:
    """The rank's share of the rows, as even as can be."""
    first, last = (len(whole) * at // size for at in (rank, rank + 1))
    return Rect((first, *(0,) * (whole.dim() - 1)), (last - first, *whole.shape[1:]))


def save(run_dir: Path, states: Sequence[Sequence[Slice]]) -> Path:
    """By as many ranks as there are states."""
    progress = Progress(step=1, world_size=len(states))
    return on_ranks(len(states), lambda group: writer.save(run_dir, states[group.rank], progress, group, KEEP_ALL))[0]


def forge_tensors(folder: Path, **tensors: dict[str, str]) -> None:
    """The manifest says that ``part`` 0, 1, ... hold something else, and has the digest that belongs to it."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    fields.pop("manifest_sha256")
    for number, held in tensors.items():
        fields["parts"][int(number.removeprefix("part"))]["tensors"] = held
    path.write_text(json.dumps({**fields, "manifest_sha256": fields_sha256(fields)}))


# --- written in pieces -------------------------------------------------------------------------------------------


def test_the_picture_of_a_fused_qkv(tmp_path: Path):
    """See slices.py; and the names in the files."""
    qkv, norm = torch.arange(24.0).reshape(6, 4), torch.ones(4)
    states = [
        [piece_of("qkv", qkv, [Rect((row + rank, 0), (1, 4)) for row in (0, 2, 4)]), *slices_of({"norm": norm})]
        for rank in (0, 1)
    ]
    folder = save(tmp_path, states)
    held = []
    for path in sorted(folder.glob("part-*")):
        with safe_open(path, "pt") as file:
            held.append(sorted(file.keys()))
    assert held == [
        ["norm", "qkv[0:1,0:4]", "qkv[2:3,0:4]", "qkv[4:5,0:4]"],
        ["qkv[1:2,0:4]", "qkv[3:4,0:4]", "qkv[5:6,0:4]"],
    ]
    parts = json.loads((folder / "manifest.json").read_text())["parts"]
    assert [part["tensors"] for part in parts] == [
        {key: "F32[4]" if key == "norm" else "F32[6,4]" for key in keys} for keys in held
    ]
    assert read_progress(folder).world_size == 2
    saved = Checkpoint(folder)
    assert (set(saved), saved.whole("qkv")) == ({"qkv", "norm"}, ((6, 4), torch.float32))
    assert torch.equal(saved.read("qkv"), qkv)
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            places = [Rect((part + n, 0), (1, 4)) for part in (0, 2, 4) for n in range(2) if n % ranks == rank]
            if places:
                assert torch.equal(saved.read("qkv", places), torch.cat([taken(qkv, place) for place in places]))
    assert torch.equal(saved.read("qkv", [Rect((1, 1), (4, 2))]), qkv[1:5, 1:3])


@settings(max_examples=60)
@given(st.integers(0, 1 << 32))
def test_whatever_the_cuts(tmp_path_factory: pytest.TempPathFactory, seed: int):
    """Tensors cut at random, each piece held by some ranks; read as cut in another way, and whole."""
    chance = random.Random(seed)
    size = chance.randrange(1, 4)
    states: list[list[Slice]] = [[] for _ in range(size)]
    wholes = {}
    for name in ("a", "b.c", "d[0:1]"):
        shape = [chance.randrange(1, 6) for _ in range(chance.randrange(4))]
        wholes[name] = torch.tensor([chance.random() for _ in range(torch.Size(shape).numel())]).reshape(shape)
        if chance.random() < 0.3:
            wholes[name] = wholes[name].bfloat16()
        for rect in cut(chance, whole_rect(shape)):
            for rank in chance.sample(range(size), chance.randrange(1, size + 1)):
                states[rank].append(Slice(name, taken(wholes[name], rect), wholes[name].shape, (rect,), ALONE))
    folder = save(tmp_path_factory.mktemp("run"), states)
    stored = [key for path in folder.glob("part-*") for key in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert sorted(stored) == sorted({key_of(piece) for state in states for piece in state})  # each once
    saved = Checkpoint(folder)
    for name, whole in wholes.items():
        assert saved.whole(name) == (whole.shape, whole.dtype)
        assert torch.equal(saved.read(name), whole)
        for _, places in groupby(cut(chance, whole_rect(whole.shape)), key=lambda rect: rect.shape[1:]):
            places = list(places)
            pieces = [taken(whole, place) for place in places]
            assert torch.equal(saved.read(name, places), torch.cat(pieces) if len(pieces) > 1 else pieces[0])


def test_the_same_bytes_every_time(tmp_path: Path):
    """Also where ranks hold different things, and some the same."""
    whole = {name: torch.randn(7, 3) for name in "abcdef"}
    states = [
        [piece_of(name, tensor, [rows(tensor, rank % 2, 2)]) for name, tensor in whole.items()]
        + slices_of({"norm": torch.ones(5), "step": torch.tensor(3.0)})
        for rank in range(4)
    ]
    folders = [save(tmp_path / name, states) for name in ("one", "two")]
    assert snapshot(folders[0]) == snapshot(folders[1])
    sizes = [path.stat().st_size for path in folders[0].glob("part-*")]
    assert max(sizes) < 1.5 * min(sizes)


def test_more_ranks_than_pieces(tmp_path: Path):
    folder = save(tmp_path, [slices_of({"x": torch.ones(3)})] * 3)
    assert torch.equal(tensors_in(folder)["x"], torch.ones(3))
    assert len(list(folder.glob("part-*"))) == 3


# --- a model in pieces -------------------------------------------------------------------------------------------


class Cut(nn.Module):
    """A rank's rows of one weight, and all of another."""

    def __init__(self, rank: int, size: int):
        super().__init__()
        whole = torch.arange(24.0).reshape(6, 4)
        self.place = rows(whole, rank, size)
        self.cut, self.shared = nn.Parameter(taken(whole, self.place).clone()), nn.Parameter(torch.ones(3))
        self.optimizer, self.ema = (
            make_optimizer(self.parameters(), OptimOptions(lr=0.1)),
            Ema(self.slices(), EMA),
        )

    def slices(self) -> list[Slice]:
        cut = Slice("cut", self.cut, torch.Size((6, 4)), (self.place,), ALONE)
        return [cut, whole_slice("shared", self.shared, ALONE)]

    def walk(self) -> "Cut":
        """A step whose gradient is known of each place, whoever holds it."""
        slope = torch.arange(24.0).reshape(6, 4) - 11
        self.cut.grad, self.shared.grad = taken(slope, self.place).clone(), torch.full((3,), 0.5)
        self.optimizer.step()
        self.ema.update(1)
        return self

    def state(self) -> list[Slice]:
        return run_state(self.slices(), self.optimizer, self.ema)


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_a_run_in_pieces_goes_on_in_others(tmp_path: Path, writers: int, readers: int):
    """Weights, moments and averages to the bit; then a step more, which rounds otherwise at the end of a tensor."""
    states = [Cut(rank, writers).walk().state() for rank in range(writers)]
    expected = {piece.name: torch.full(piece.whole, -1, dtype=piece.tensor.dtype) for piece in states[0]}
    for piece in (piece for state in states for piece in state):
        taken(expected[piece.name], piece.places[0]).copy_(piece.tensor)
    folder = save(tmp_path, states)
    found = tensors_in(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    unbroken = {piece.name: piece.tensor for piece in Cut(0, 1).walk().walk().state()}
    for rank in range(readers):
        resumed = Cut(rank, readers)
        load(folder, resumed.slices(), resumed.optimizer, resumed.ema)
        assert {piece.name for piece in resumed.state()} == expected.keys()
        for piece in resumed.state():
            assert torch.equal(piece.tensor, taken(expected[piece.name], piece.places[0])), piece.name
        for piece in resumed.walk().state():
            torch.testing.assert_close(piece.tensor, taken(unbroken[piece.name], piece.places[0]), rtol=1e-6, atol=0)


def test_the_averages_of_pieces_are_looked_at(tmp_path: Path):
    folder = save(tmp_path, [Cut(rank, 3).walk().state() for rank in range(3)])
    model = Cut(1, 2)
    load(folder, model.slices(), weights="ema")
    found = tensors_in(folder)
    assert torch.equal(model.cut, found["ema.cut"][3:])
    assert not torch.equal(model.cut, found["model.cut"][3:])


def test_a_rank_reads_what_it_holds_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save(tmp_path, [Cut(rank, 3).walk().state() for rank in range(3)])
    counted = bytes_read(monkeypatch)
    for size in (1, 2, 4):
        for rank in range(size):
            model = Cut(rank, size)
            counted.clear()
            load(folder, model.slices(), model.optimizer)
            read = sum(counted.values())
            held = [piece.tensor for piece in run_state(model.slices(), model.optimizer)]
            assert read == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_a_part_that_nobody_needs_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = save(
        tmp_path, [[piece_of("model.x", torch.randn(4, 3), [rows(torch.empty(4, 3), rank, 2)])] for rank in range(2)]
    )
    opened, safe = [], reader.safe_open
    monkeypatch.setattr(reader, "safe_open", lambda path, **how: opened.append(path.name) or safe(path, **how))
    Checkpoint(folder).read("model.x", [Rect((2, 0), (2, 3))])
    assert opened == ["part-00001-of-00002.safetensors"]


# --- what cannot be ----------------------------------------------------------------------------------------------

WRONG = {
    "a gap": ({"x[0:1,0:2]": "F32[4,2]"}, "x has 8 numbers, and 6 are stored"),
    "an overlap": ({"x[0:3,0:2]": "F32[4,2]"}, "x has 8 numbers, and 10 are stored"),
    "outside": ({"x[3:5,0:2]": "F32[4,2]"}, "no place in the shape"),
    "backwards": ({"x[2:0,0:2]": "F32[4,2]"}, "no place in the shape"),
    "negative": ({"x[-2:0,0:2]": "F32[4,2]"}, "which has|are stored|no place"),
    "fewer sides": ({"x[0:2]": "F32[4,2]"}, "no place in the shape"),
    "another shape": ({"x[0:2,0:2]": "F32[5,2]"}, "are not of one tensor"),
    "another type": ({"x[0:2,0:2]": "I32[4,2]"}, "are not of one tensor"),
    "strange type": ({"x[0:2,0:2]": "F33[4,2]"}, "is no type and shape"),
    "no type": ({"x[0:2,0:2]": "../x"}, "is no type and shape"),
    "huge": ({"x[0:2,0:2]": f"F32[4,2,{1 << 50}]"}, "is too large a shape"),
    "long": ({"x[0:2,0:2]": f"F32[{'9' * 5000}]"}, "damaged"),
    "more than the file": ({"x[0:2,0:2]": "F32[4,2]", "y": "F32[1000]"}, "too small for what it holds"),
    "twice": ({"x[2:4,0:2]": "F32[4,2]"}, "which another part holds too"),
    "nobody's": ({}, "x has 8 numbers, and 4 are stored"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_manifest_that_cannot_be_is_damaged(tmp_path: Path, what: str):
    tensors, message = WRONG[what]
    whole = torch.randn(4, 2)
    folder = save(tmp_path, [[piece_of("x", whole, [rows(whole, rank, 2)])] for rank in range(2)])
    forge_tensors(folder, part0=tensors)
    for open_it in (read_progress, Checkpoint):
        with pytest.raises(CheckpointError, match=message) as caught:
            open_it(folder)
        assert str(caught.value).startswith(f"{folder}/manifest.json is damaged")


def test_a_gap_as_large_as_an_overlap(tmp_path: Path):
    """The sum fits; nobody is given numbers from nowhere."""
    whole = torch.randn(6)
    folder = save(tmp_path, [[piece_of("x", whole, [rows(whole, rank, 3)])] for rank in range(3)])
    forge_tensors(folder, part1={"x[1:3]": "F32[6]"})
    saved = Checkpoint(folder)
    for places in (None, [Rect((0,), (2,))], [Rect((3,), (1,))]):
        with pytest.raises(CheckpointError, match="what is stored of x has a gap or an overlap"):
            saved.read("x", places)
    assert torch.equal(saved.read("x", [Rect((4,), (2,))]), whole[4:])


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("x", "F32[2,2]", r"x needs F32\[2,2\], found F32\[4\]"),
        ("x", "I32[4]", r"x needs I32\[4\], found F32\[4\]"),
        ("y", "F32[4]", "cannot read"),
    ],
)
def test_a_part_that_holds_something_else(tmp_path: Path, key: str, kind: str, message: str):
    folder = save(tmp_path, [slices_of({"x": torch.ones(4)})])
    forge_tensors(folder, part0={key: kind})
    saved = Checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        saved.read(key)


@given(st.text(min_size=1), st.lists(st.integers(0, 9), max_size=3), st.sampled_from([torch.float32, torch.bool]))
def test_what_is_said_of_a_piece_is_understood(name: str, shape: list[int], dtype: torch.dtype):
    """Whatever the name."""
    whole = whole_slice(name, torch.zeros(shape, dtype=dtype), ALONE)
    for place in cut(random.Random(len(name)), whole_rect(shape)):
        piece = Slice(name, taken(whole.tensor, place), whole.whole, (place,), ALONE)
        told = parse_stored("part", key_of(piece), kind_of(piece.whole, dtype))
        assert told[2:] == (name, place, torch.Size(shape), dtype)


def test_states_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The names of a checkpoint are gone through once, however many parameters there are."""
    model = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(50)])
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    for parameter in model:
        parameter.grad = torch.ones(1)
    optimizer.step()
    slices = whole_slices(model, ALONE)
    folder = save(tmp_path, [run_state(slices, optimizer)])
    turns, names = [], Checkpoint.__iter__
    monkeypatch.setattr(Checkpoint, "__iter__", lambda saved: turns.append(1) or names(saved))
    load(folder, slices, optimizer)
    assert len(turns) == 1
