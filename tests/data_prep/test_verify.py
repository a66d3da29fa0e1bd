"""`verify` finds every kind of damage, names shard and place, and says the same on any number of ranks."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from preparing import files_of, run, text_kind, write
from threads import on_ranks
from tiny import rewrite, seal

from data_prep.__main__ import main
from data_prep.verify import verify
from hvdtrain.data.shards import read_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, HvdtrainError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, byte: Path) -> Path:
    """Shards of about ten units; look, do not touch."""
    folder = tmp_path_factory.mktemp("verify")
    files = files_of(write(folder / "in", **{"a.txt": "".join(f"line {n}\n" for n in range(100))}))
    run(lambda: text_kind(files, "line"), byte, folder / "out", shard_tokens=100, val_fraction=0.1)
    return folder / "out"


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "shards")
    return tmp_path / "shards"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def resealed(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Damage whose digests are right: only what the shard holds is wrong."""

    def damage(folder: Path) -> None:
        rewrite(folder / "train-00002.h5", change)
        seal(folder)

    return damage


def put(name: str, at: int, value: int) -> Callable[[Path], None]:
    return resealed(lambda datasets: datasets[name].__setitem__(at, value))


DAMAGE = {
    "flipped bit": (lambda f: flip(f / "train-00002.h5", -40), r"{s} is damaged in block 0, bytes 0 to \d+: .*SHA-256"),
    "flipped first": (lambda f: flip(f / "train-00002.h5", 0), r"{s} is damaged in block 0"),
    "truncated": (lambda f: os.truncate(f / "train-00002.h5", 900), "{s} has 900 bytes, the manifest says .*truncated"),
    "empty": (lambda f: os.truncate(f / "train-00002.h5", 0), "{s} has 0 bytes, the manifest says"),
    "longer": (lambda f: os.truncate(f / "train-00002.h5", 9999), "{s} has 9999 bytes"),
    "missing": (lambda f: (f / "train-00002.h5").unlink(), "{s} is listed in the manifest but is missing"),
    "a folder": (lambda f: _be_a_folder(f / "train-00002.h5"), "{s} has"),
    "swapped": (lambda f: _swap(f / "train-00002.h5", f / "train-00003.h5"), "{s} (is damaged|has)"),
    "strange": (
        lambda f: shutil.copy(f / "train-00002.h5", f / "train-00099.h5"),
        r"{f}/train-00099\.h5 is not listed in the manifest: it belongs to another preparation",
    ),
    "beyond the vocabulary": (put("tokens", 7, 65535), r"{s}: /tokens\[7\] is 65535, beyond the vocabulary of 261"),
    "backwards": (put("doc_offsets", 2, 0), "{s}: /doc_offsets goes backwards at document 1"),
    "beyond the end": (put("doc_offsets", -1, 9999), "{s}: /doc_offsets goes from 0 to 9999, but the shard has"),
    "not from 0": (put("doc_offsets", 0, 1), "{s}: /doc_offsets goes from 1 to"),
    "a lost dataset": (resealed(lambda datasets: datasets.pop("doc_offsets")), "{s} has no /doc_offsets"),
    "another length": (
        resealed(lambda datasets: datasets.update(tokens=datasets["tokens"][:-1])), "{s} holds /tokens .* manifest says"
    ),
}  # fmt: skip


def _be_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_whole(made: Path, ranks: int, capsys: pytest.CaptureFixture):
    assert on_ranks(ranks, lambda one: verify(made, one, 2)) == [[]] * ranks
    output = capsys.readouterr()
    assert output.err == ""
    manifest = read_manifest(made)
    head, train, val, verdict, speed = (line.split() for line in output.out.splitlines())
    assert head == ["split", "shards", "documents", "tokens", "bytes", "problems"]
    for row, split in ((train, "train"), (val, "val")):
        infos = manifest.split(split)
        sums = (sum(info.documents for info in infos), sum(info.tokens for info in infos))
        size = sum((made / info.file).stat().st_size for info in infos)
        assert [row[0], *(int(cell.replace(",", "")) for cell in row[1:])] == [split, len(infos), *sums, size, 0]
    assert " ".join(verdict) == f"{made}: whole; data digest {manifest.data_digest}"
    assert speed[-1] == "MB/s)"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder: Path, damage: str, capsys: pytest.CaptureFixture):
    harm, message = DAMAGE[damage]
    harm(folder)
    found = {ranks: on_ranks(ranks, lambda one: verify(folder, one, 2)) for ranks in (1, 3)}
    problems = found[1][0]
    assert all(one == problems for ranks in found.values() for one in ranks)
    pattern = message.format(s=f"shard {folder}/train-00002.h5", f=folder)
    assert len([problem for problem in problems if re.search(pattern, problem)]) == 1
    assert len(problems) == (2 if damage == "swapped" else 1)
    output = capsys.readouterr()
    assert f"{folder}: {len(problems)} problems; data digest" in output.out
    assert all(f"data_prep: {problem}\n" in output.err for problem in problems)
    if damage != "strange":  # of no split
        assert f" {len(problems)}\n" in output.out.split("val")[0]


def test_all_problems_are_named_in_one_run(folder: Path):
    put("tokens", 0, 300)(folder)
    (folder / "train-00000.h5").unlink()
    flip(folder / "train-00001.h5", -1)
    flip(folder / "val-00005.h5" if (folder / "val-00005.h5").exists() else folder / "train-00005.h5", 100)
    problems = on_ranks(2, lambda one: verify(folder, one, 1))[0]
    assert [re.search(r"(train|val)-\d+", problem)[0][-5:] for problem in problems] == [
        "00000",
        "00001",
        "00002",
        "00005",
    ]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "no shards in {f}: manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{}"), "{f}/manifest.json is damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), "{f}/tokenizer.json is missing; it belongs to the shards"),
        (lambda f: flip(f / "tokenizer.json", 20), "{f}/tokenizer.json is not"),
        (lambda f: shutil.rmtree(f), r"no shards in {f} \(there is no such folder\)"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_manifest_there_is_nothing_to_check(folder: Path, harm, message: str, ranks: int):
    harm(folder)
    with pytest.raises(HvdtrainError, match=message.format(f=folder)) as caught:
        on_ranks(ranks, lambda one: verify(folder, one, 1))
    assert caught.value.exit_code == EXIT_BAD_DATA


def test_the_exit_code(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # main() sets it where it is not
    assert main(["verify", str(folder)]) == EXIT_OK
    flip(folder / "train-00002.h5", 50)
    assert main(["verify", str(folder)]) == EXIT_BAD_DATA
    shutil.rmtree(folder)
    assert main(["verify", str(folder)]) == EXIT_BAD_DATA
    assert capfd.readouterr().err.count("hvdtrain: DataError: no shards in") == 1
