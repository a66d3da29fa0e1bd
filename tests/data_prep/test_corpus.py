"""The input's files: plain or compressed, every byte is kept, an error names the file, and a corpus is known again."""

import io
import random
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from preparing import compressed, files_of, write

from data_prep.corpus import COMPRESSIONS, InputFile, files_sha256
from hvdtrain.errors import DataError

# --- opening -----------------------------------------------------------------------------------------------------


def test_suffix_and_compression():
    kinds = {name: InputFile(Path(name), name, 1, 0) for name in ("a.jsonl", "a.jsonl.gz", "a.b.txt.xz", "a", "a.zst")}
    assert [(file.suffix, file.compression) for file in kinds.values()] == [
        (".jsonl", ""), (".jsonl", ".gz"), (".txt", ".xz"), ("", ""), ("", ".zst"),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["", *COMPRESSIONS])
def test_every_byte_is_kept(tmp_path: Path, suffix: str):
    text = "\ufeffline\r\nwindows\rmac\n\tzero\u200bwidth e\u0301 \U0001f468\u200d\U0001f469 漢字\u3000\n\n" * 3000
    (file,) = files_of(write(tmp_path, **{f"a.txt{suffix}": text}))
    assert file.read_all() == text.encode()
    with file.open() as handle:  # in odd parts
        assert b"".join(iter(lambda: file.read(handle, 777), b"")) == text.encode()
        assert file.read(handle, 5) == b""  # and nothing after the end


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_several_streams_in_one_file_are_one_text(tmp_path: Path, suffix: str):
    """`cat a.gz b.gz`, and what pigz, pzstd and bgzip write; an empty one too."""
    (tmp_path / f"a.txt{suffix}").write_bytes(b"".join(compressed(part, suffix) for part in (b"one ", b"", b"two")))
    (file,) = files_of(tmp_path)
    assert file.read_all() == b"one two"


def test_a_frame_of_unknown_length_and_one_to_be_skipped(tmp_path: Path):
    stream = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(stream, closefd=False) as writer:
        writer.write(b"text")
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    (tmp_path / "a.txt.zst").write_bytes(skipped + stream.getvalue() + skipped)
    assert files_of(tmp_path)[0].read_all() == b"text"


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut", "last byte", "flipped", "not compressed"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, damage: str):
    """zstandard's own reader takes a file that was cut off for one that ended: half a corpus, and nobody told."""
    whole = compressed(random.Random(1).randbytes(3000).hex().encode(), suffix)
    damaged = {
        "cut": whole[: len(whole) // 2],
        "last byte": whole[:-1],
        "flipped": whole[:40] + bytes(255 - byte for byte in whole[40:60]) + whole[60:],
        "not compressed": b"This is text, in spite of its name.\n",
    }[damage]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damaged)
    (file,) = files_of(path)
    with pytest.raises(DataError, match=f"cannot read {path}: "):
        file.read_all()


def test_a_file_that_vanishes_is_named(tmp_path: Path):
    for suffix in ("", *COMPRESSIONS):
        (file,) = files_of(write(tmp_path, **{f"a.txt{suffix}": "a"}) / f"a.txt{suffix}")
        file.path.unlink()
        with pytest.raises(DataError, match=rf"cannot read {file.path}: No such file"):
            file.read_all()


# --- knowing again -----------------------------------------------------------------------------------------------


def test_a_corpus_is_known_again(tmp_path: Path):
    def digest(name: str, **files: str) -> str:
        return files_sha256(files_of(write(tmp_path / name, **files)))

    first = digest("1", **{"a.txt": "x", "b.txt": "y"})
    assert digest("2", **{"a.txt": "x", "b.txt": "y"}) == first  # wherever it lies, and whenever it was written
    others = [{"a.txt": "xy", "b.txt": ""}, {"a.txt": "x"}, {"a.txt": "x", "c.txt": "y"}, {"a.txt": "x", "b.txt": "yz"}]
    digests = [digest(f"o{n}", **files) for n, files in enumerate(others)]
    assert len({first, *digests}) == 5


def test_split_time_and_partner_tell_files_apart(tmp_path: Path):
    (file,) = files_of(write(tmp_path, **{"a.txt": "x"}) / "a.txt")
    others = [
        file,
        replace(file, split="val"),
        replace(file, partner=file),
        replace(file, partner=replace(file, bytes=9)),
    ]
    assert len({files_sha256([one]) for one in others}) == 4
    later = replace(file, mtime_ns=file.mtime_ns + 1)
    assert files_sha256([later]) == files_sha256([file])
    assert files_sha256([later], with_time=True) != files_sha256([file], with_time=True)
    pair, later_pair = replace(file, partner=file), replace(file, partner=later)
    assert files_sha256([later_pair], with_time=True) != files_sha256([pair], with_time=True)
