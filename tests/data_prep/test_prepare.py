"""A preparation is whole, kept, or gone on with; it is the same for every number of ranks."""

import json
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from preparing import files_of, run, shards_of, snapshot, text_kind, texts_of, write
from threads import on_ranks

from data_prep import prepare as prepare_module
from data_prep.corpus import InputFile
from data_prep.labels import LabelsKind
from data_prep.pieces import Piece
from data_prep.prepare import PrepareOptions, prepare
from data_prep.tables import TableReader
from data_prep.tokenizer import build_tokenizer
from data_prep.tokenizer_file import load_tokenizer
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.data.shards import Manifest, read_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_IO, EXIT_USAGE, ConfigError, HvdtrainError, RankError

LINES = [f"line {n:03} of many" for n in range(120)]


class Killed(BaseException):
    pass


class Corpus:
    """Three files of forty lines, a document each, and preparations of them into about twenty units."""

    def __init__(self, folder: Path, tokenizer: Path):
        self.folder, self.tokenizer, self.out = folder, tokenizer, folder / "out"
        self.options: dict[str, Any] = {"val_fraction": 0.1, "shard_tokens": 100}
        self.reader: dict[str, Any] = {"documents": "line"}
        for name, first in (("a", 0), ("b", 40), ("c", 80)):
            write(folder / "in", **{f"{name}.txt": "".join(f"{line}\n" for line in LINES[first : first + 40])})

    def kind(self):
        return text_kind(files_of(self.folder / "in"), **self.reader)

    def prepare(self, out: str = "out", ranks: int = 1) -> tuple[Manifest, bool]:
        return run(self.kind, self.tokenizer, self.folder / out, ranks, **self.options)

    def whole(self) -> dict[str, bytes]:
        """What an undisturbed preparation gives."""
        shutil.rmtree(self.folder / "whole", ignore_errors=True)
        self.prepare("whole")
        return snapshot(self.folder / "whole")

    def interrupt(self, after: int, ranks: int = 1) -> None:
        """End a preparation as a kill would, when so many units have been written."""
        write_json, written = prepare_module.write_json, count()

        def write_or_die(path: Path, value: Any) -> None:
            if path.name[0].isdigit() and next(written) >= after:
                raise Killed
            write_json(path, value)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(prepare_module, "write_json", write_or_die)
            self.prepare(ranks=ranks)
        assert not (self.out / "manifest.json").exists()
        assert len(self.records()) == after

    def records(self) -> set[str]:
        return {path.name for path in (self.out / ".parts").glob("[0-9]*.json")}

    def shards(self) -> dict[str, tuple[int, int]]:
        """Name -> what tells whether it was written again."""
        return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in self.out.glob("*.h5")}

    def finished_shards(self) -> dict[str, tuple[int, int]]:
        """Of the units that have a record."""
        return {name: state for name, state in self.shards().items() if f"{name[-8:-3]}.json" in self.records()}

    def edit(self, name: str, old: str, new: str) -> None:
        """Change a file, but not its size."""
        path = self.folder / "in" / f"{name}.txt"
        text = path.read_text(encoding="utf-8")
        assert old in text
        assert len(old.encode()) == len(new.encode())
        path.write_text(text.replace(old, new), encoding="utf-8")
        self.touch(name)

    def touch(self, *names: str) -> None:
        for name in names:
            path = self.folder / "in" / f"{name}.txt"
            later = path.stat().st_mtime_ns + 10**9
            os.utime(path, ns=(later, later))

    def texts(self, out: str = "out") -> list[str]:
        return [text for split in ("train", "val") for text in texts_of(self.folder / out, split)]


@pytest.fixture
def corpus(tmp_path: Path, byte: Path) -> Corpus:
    return Corpus(tmp_path, byte)


def falls_to_training(text: str) -> bool:
    piece = Piece(InputFile(Path("a"), "a", 1, 0), 0, 1, None)
    return prepare_module.SplitsOf(PrepareOptions(val_fraction=0.1))((text.encode(),), piece)[0] == "train"


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows these lines: other words take more tokens, so that the units are cut otherwise."""
    path = tmp_path_factory.mktemp("learned") / "tokenizer.json"
    build_tokenizer(LINES, "bpe", 300).save(str(path))
    return path


def count_units(files: dict[str, bytes]) -> int:
    return len(json.loads(files["manifest.json"])["source"]["units"])


# --- any number of ranks -----------------------------------------------------------------------------------------


def test_the_same_bytes_for_every_number_of_ranks(corpus: Corpus):
    whole = corpus.whole()
    assert count_units(whole) > 15
    for ranks in (2, 7, 24):  # of 24 some have nothing to do
        corpus.prepare(f"out{ranks}", ranks)
        assert snapshot(corpus.folder / f"out{ranks}") == whole
    assert sorted(corpus.texts("out7")) == LINES


def test_ranks_that_do_not_mean_the_same_are_refused(corpus: Corpus):
    def work(ranks):
        kind = text_kind(files_of(corpus.folder / "in"), "line", most=ranks.rank)
        return prepare(kind, PrepareOptions(), load_tokenizer(corpus.tokenizer), corpus.out, ranks)

    with pytest.raises(RankError, match=r"what is to be prepared differs between ranks: .*max_tokens.*rank 1 has"):
        on_ranks(2, work)
    assert not corpus.out.exists()


def test_more_ranks_than_units_is_said(corpus: Corpus, capfd: pytest.CaptureFixture):
    corpus.options["shard_tokens"] = 1 << 20
    corpus.prepare(ranks=2)
    assert (
        "the input is work for only 1 of 2 ranks; for more, lower --shard-tokens; a compressed"
        in capfd.readouterr().err
    )


# --- gone on with ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (3, 1), (2, 4)])
def test_what_is_done_is_kept(corpus: Corpus, ranks: tuple[int, int], capfd: pytest.CaptureFixture):
    whole = corpus.whole()
    corpus.interrupt(6, ranks[0])
    kept = corpus.finished_shards()
    assert len(kept) >= 6
    assert list(corpus.out.glob("*manifest*")) == []  # nothing counts before the end
    assert corpus.prepare(ranks=ranks[1])[1] is False
    assert f"going on with an interrupted preparation: 6 of {count_units(whole)} units" in capfd.readouterr().err
    assert snapshot(corpus.out) == whole
    assert {name: corpus.shards()[name] for name in kept} == kept  # not written again


def test_a_half_written_file_is_removed(corpus: Corpus):
    whole = corpus.whole()
    corpus.interrupt(3)
    for name in ("train-00004.h5", "val-00000.h5", "manifest.json", "tokenizer.json"):
        (corpus.out / f".{name}.1234.tmp").write_bytes(b"half")
    (corpus.out / ".parts" / ".00004.json.1234.tmp").write_bytes(b"half")
    (corpus.out / "train-00005.h5").write_bytes(b"whole, but it has no record")
    corpus.prepare()
    assert snapshot(corpus.out) == whole


def test_a_shard_that_is_gone_or_cut_since_is_made_again(corpus: Corpus):
    whole = corpus.whole()
    corpus.interrupt(6)
    (corpus.out / "train-00001.h5").unlink()
    os.truncate(corpus.out / "train-00002.h5", 100)
    corpus.prepare()
    assert snapshot(corpus.out) == whole


def test_what_was_only_touched_since_is_not_encoded_again(corpus: Corpus):
    corpus.interrupt(6)
    kept = corpus.finished_shards()
    corpus.touch("a", "b", "c")
    corpus.prepare()
    assert {name: corpus.shards()[name] for name in kept} == kept
    assert sorted(corpus.texts()) == LINES


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_file_that_changed_since_is_read_again(corpus: Corpus, ranks: int):
    corpus.interrupt(9)
    kept = corpus.finished_shards()
    corpus.edit("a", LINES[7], "LINE 007 OF MANY")
    corpus.prepare(ranks=ranks)
    assert snapshot(corpus.out) == corpus.whole()
    assert sorted(corpus.texts()) == ["LINE 007 OF MANY", *LINES[:7], *LINES[8:]]
    assert sum(corpus.shards()[name] == state for name, state in kept.items()) >= len(kept) - 2  # but no more


def test_units_that_are_cut_otherwise_since_are_not_mixed(corpus: Corpus, learned: Path):
    """A change of one file can change the bytes of a token, and with them where all the others are cut."""
    corpus.tokenizer = learned
    corpus.options["shard_tokens"] = 20
    before = corpus.whole()
    corpus.interrupt(9)
    corpus.edit("c", "of many", "ZQXJKVW")
    corpus.prepare()
    after = corpus.whole()
    assert count_units(after) > count_units(before)
    assert snapshot(corpus.out) == after
    assert sorted(corpus.texts()) == [*LINES[:80], *(line.replace("of many", "ZQXJKVW") for line in LINES[80:])]


def test_shards_beyond_the_last_are_removed(corpus: Corpus, learned: Path):
    """The same, the other way: fewer units than the interrupted preparation had written."""
    corpus.tokenizer = learned
    corpus.options["shard_tokens"] = 20
    corpus.edit("c", "of many", "ZQXJKVW")
    before = corpus.whole()
    corpus.interrupt(count_units(before) - 1)
    corpus.edit("c", "ZQXJKVW", "of many")
    corpus.prepare()
    after = corpus.whole()
    assert count_units(after) < count_units(before) - 1
    assert snapshot(corpus.out) == after
    assert corpus.prepare()[1] is True


def test_a_shard_that_is_no_longer_needed_is_removed(corpus: Corpus):
    """The only document that a unit had for validation falls to training after a change."""
    corpus.whole()
    shard = read_manifest(corpus.folder / "whole").split("val")[0]
    text = texts_of(corpus.folder / "whole", "val")[0]
    corpus.interrupt(int(shard.file[4:9]) + 1)
    assert (shard.documents, shard.file in corpus.shards()) == (1, True)
    corpus.edit("a", text, next(other for other in map(text.replace, "lime", "LIME") if falls_to_training(other)))
    corpus.prepare()
    assert shard.file not in corpus.shards()
    assert snapshot(corpus.out) == corpus.whole()
    assert corpus.prepare()[1] is True  # no shard is there that the manifest does not list


def test_which_copy_is_kept_changes_with_another_file(corpus: Corpus):
    """A unit that is done left out a line because an earlier file had it; now that file has it no more."""
    corpus.options["deduplicate"] = True
    corpus.edit("c", LINES[80], LINES[3])
    whole = corpus.whole()
    assert sorted(corpus.texts("whole")) == [*LINES[:80], *LINES[81:]]
    corpus.interrupt(count_units(whole) - 1)
    corpus.edit("a", LINES[3], "another line now")
    corpus.prepare()
    assert snapshot(corpus.out) == corpus.whole()
    assert corpus.texts().count(LINES[3]) == 1


def test_the_numbers_of_labels_change_with_another_file(tmp_path: Path, byte: Path):
    def prepare_labels(out: str) -> list[tuple[str, int]]:
        files = files_of(tmp_path / "in")
        manifest, _ = run(
            lambda: LabelsKind(TableReader(files, ["label", "text"]), (1, 2)), byte, tmp_path / out, shard_tokens=30
        )
        numbers = [number for shard in shards_of(tmp_path / out, "train") for number in shard["labels"]]
        return [manifest.label_names[number] for number in numbers]

    rows = [("b", f"text {n}") for n in range(10)] + [("c", f"text {n}") for n in range(10)]
    content = "label\ttext\n" + "".join(f"{label}\t{text}\n" for label, text in rows)
    write(tmp_path / "in", **{"1.tsv": content, "2.tsv": content})
    write_json, written = prepare_module.write_json, count()

    def write_or_die(path: Path, value: Any) -> None:
        if path.name[0].isdigit() and next(written) >= 6:
            raise Killed
        write_json(path, value)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(prepare_module, "write_json", write_or_die)
        prepare_labels("out")
    write(tmp_path / "in", **{"2.tsv": content.replace("c\t", "a\t")})
    os.utime(tmp_path / "in" / "2.tsv", (0, 0))
    expected = [label for label, _ in rows] + [label.replace("c", "a") for label, _ in rows]
    assert prepare_labels("out") == expected == prepare_labels("whole")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "reader", "tokenizer"),
    [
        ({"shard_tokens": 300}, {}, "byte"),
        ({"val_fraction": 0.5}, {}, "byte"),
        ({}, {"most": 17}, "byte"),
        ({}, {}, "bpe"),
    ],
)
def test_other_settings_begin_anew(
    corpus: Corpus,
    tokenizers_of: dict[str, Path],
    options: dict,
    reader: dict,
    tokenizer: str,
    capfd: pytest.CaptureFixture,
):
    corpus.interrupt(18)
    corpus.tokenizer = tokenizers_of[tokenizer]
    corpus.options |= options
    corpus.reader |= reader
    corpus.prepare()
    assert "going on" not in capfd.readouterr().err
    assert snapshot(corpus.out) == corpus.whole()


def test_beginning_anew_leaves_strangers_alone(corpus: Corpus):
    """A folder may hold files of the user's own."""
    corpus.out.mkdir()
    mine = ("measurements.h5", ".notes.tmp", "train-1.h5", ".train-00000.h5.tmp")
    for name in mine:
        (corpus.out / name).write_bytes(b"precious")
    (corpus.out / "train-00099.h5").write_bytes(b"half")
    corpus.prepare()
    assert [(corpus.out / name).read_bytes() for name in mine] == [b"precious"] * 4
    assert not (corpus.out / "train-00099.h5").exists()
    assert read_manifest(corpus.out).shards


# --- kept --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("touched", [False, True])
def test_a_complete_preparation_is_kept(corpus: Corpus, touched: bool, ranks: int):
    manifest, _ = corpus.prepare()
    before = {path: path.stat().st_mtime_ns for path in corpus.out.glob("[!.]*")}
    if touched:
        corpus.touch("a", "c")
    assert corpus.prepare(ranks=ranks) == (manifest, True)
    assert {path: path.stat().st_mtime_ns for path in corpus.out.glob("[!.]*")} == before


@pytest.mark.parametrize("ranks", [1, 3])
def test_other_bytes_of_the_same_size_are_refused(corpus: Corpus, ranks: int):
    corpus.prepare()
    before = snapshot(corpus.out)
    corpus.edit("b", LINES[41], LINES[41].upper())
    with pytest.raises(HvdtrainError, match=r"already holds shards made otherwise \(differing: contents\)") as caught:
        corpus.prepare(ranks=ranks)
    assert caught.value.exit_code == EXIT_USAGE
    assert snapshot(corpus.out) == before


@pytest.mark.parametrize(("before", "after"), [("of many", "ZQXJKVW"), ("ZQXJKVW", "of many")])
def test_also_where_they_make_more_units_or_fewer(corpus: Corpus, learned: Path, before: str, after: str):
    corpus.tokenizer = learned
    corpus.options["shard_tokens"] = 20
    corpus.edit("b", "of many", before)
    units = len(corpus.prepare()[0].source["units"])
    corpus.edit("b", before, after)
    assert len(corpus.prepare("other")[0].source["units"]) != units
    with pytest.raises(HvdtrainError, match=r"differing: contents"):
        corpus.prepare()


@pytest.mark.parametrize(
    ("options", "reader", "named"),
    [
        ({"val_fraction": 0.5}, {}, "val_fraction"),
        ({"val_split": "tail"}, {}, "val_split"),
        ({"shard_tokens": 9}, {}, "shard_tokens"),
        ({"deduplicate": True}, {}, "deduplicate"),
        ({"deduplicate": True, "shard_tokens": 9}, {}, "deduplicate, shard_tokens"),
        ({}, {"documents": "blank-line"}, "one_document_a"),
        ({}, {"least": 2}, "min_tokens"),
        ({}, {"most": 99}, "max_tokens"),
        ({}, {"field": "body"}, "field"),
        ({}, {"cleaning": Cleaning("replace")}, "invalid_utf8"),
        ({}, {"cleaning": Cleaning(nfc=True)}, "nfc"),
    ],
)
def test_other_settings_are_refused_and_named(corpus: Corpus, options: dict, reader: dict, named: str):
    corpus.prepare()
    before = snapshot(corpus.out)
    corpus.options |= options
    corpus.reader |= reader
    with pytest.raises(ConfigError, match=rf"already holds shards made otherwise \(differing: {named}\)"):
        corpus.prepare()
    assert snapshot(corpus.out) == before


def test_another_corpus_tokenizer_or_split_is_refused(corpus: Corpus, bpe: Path):
    corpus.prepare()
    corpus.tokenizer, byte = bpe, corpus.tokenizer
    with pytest.raises(ConfigError, match=r"differing: tokenizer_sha256"):
        corpus.prepare()
    corpus.tokenizer = byte
    write(corpus.folder / "in", **{"d.txt": "new"})
    with pytest.raises(ConfigError, match=r"differing: files, files_sha256"):
        corpus.prepare()
    files = [*files_of(corpus.folder / "in" / "a.txt"), *files_of(corpus.folder / "in", split="val")[1:3]]
    with pytest.raises(ConfigError, match=r"differing: files_sha256"):
        run(lambda: text_kind(files, "line"), byte, corpus.out, **corpus.options)


@pytest.mark.parametrize("damage", ["missing", "truncated", "strange", "manifest", "tokenizer", "no tokenizer"])
def test_a_damaged_one_is_named_not_kept(corpus: Corpus, damage: str):
    corpus.prepare()
    shard = corpus.out / "train-00003.h5"
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "strange":
        shutil.copy(shard, corpus.out / "train-00099.h5")
    elif damage == "no tokenizer":
        (corpus.out / "tokenizer.json").unlink()
    else:
        (corpus.out / f"{damage}.json").write_text(json.dumps({"version": 1}))
    messages = {
        "missing": f"shard {shard} is listed in the manifest but is missing; to prepare it again, remove {corpus.out}",
        "truncated": f"shard {shard} has .* truncated or was replaced; to prepare it again, remove",
        "strange": "train-00099.h5 is not listed in the manifest",
        "manifest": f"{corpus.out}/manifest.json is damaged",
        "tokenizer": f"{corpus.out}/tokenizer.json is not a tokenizer file",
        "no tokenizer": f"{corpus.out}/tokenizer.json is missing",
    }
    with pytest.raises(HvdtrainError, match=messages[damage]) as caught:
        corpus.prepare()
    assert caught.value.exit_code == EXIT_BAD_DATA


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_preparation_at_a_time_in_a_folder(corpus: Corpus, ranks: int):
    with prepare_module._locked(corpus.out):
        with pytest.raises(HvdtrainError, match=rf"another process is preparing {corpus.out}; .* mpirun") as caught:
            corpus.prepare(ranks=ranks)
        assert caught.value.exit_code == EXIT_USAGE
        assert [path.name for path in corpus.out.iterdir()] == [".lock"]
    corpus.prepare(ranks=ranks)
    corpus.prepare(ranks=ranks)  # and it was let go


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_text_leaves_no_manifest(corpus: Corpus, ranks: int):
    write(corpus.folder / "in", **{"d.txt": b"x" * 100_000 + b"caf\xe9"})  # beyond what the sample sees
    with pytest.raises(HvdtrainError, match=r"d\.txt is not UTF-8 text: byte 100003 is 0xe9"):
        corpus.prepare(ranks=ranks)
    assert not (corpus.out / "manifest.json").exists()


def test_the_output_may_not_be_a_file(corpus: Corpus):
    corpus.out.write_text("x")
    with pytest.raises(HvdtrainError, match=rf"cannot write to {corpus.out}: File exists") as caught:
        corpus.prepare()
    assert caught.value.exit_code == EXIT_IO
