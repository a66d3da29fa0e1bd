"""Memory does not grow with the corpus: some hundred megabytes of text in a part of that."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from launch import Done, succeed

from data_prep.tokenizer import build_tokenizer

TEXT_BYTES = 300_000_000
LIMIT_BYTES = 1 << 30

# The command in a process that tells its own greatest size at the end, in kilobytes. Not by getrusage, which begins at
# the size of the process that forked it: pytest's own.
_MEASURED = """
import sys
from data_prep.__main__ import main
code = main()
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``large.txt``, words of a vocabulary of thousands, no two parts of it alike, plain and as ``.zst``, and
    ``tokenizer.json`` for it.
    """
    folder = tmp_path_factory.mktemp("large")
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmé漢字", k=draw.randint(1, 9))) for _ in range(3000)]
    block = "".join(f"{' '.join(draw.choices(words, k=60))}, NUMBER.\n" for _ in range(2400)).encode()
    build_tokenizer([block.decode()], "bpe", 2000).save(str(folder / "tokenizer.json"))
    with (
        open(folder / "large.txt", "wb") as file,
        open(folder / "large.txt.zst", "wb") as raw,
        zstandard.ZstdCompressor(1).stream_writer(raw) as packed,
    ):
        number = 0
        while file.tell() < TEXT_BYTES:
            number += 1
            part = block.replace(b"NUMBER", b"%06d" % number)
            file.write(part)
            packed.write(part)
    yield folder
    for name in ("large.txt", "large.txt.zst"):
        (folder / name).unlink()  # pytest keeps its folders for a while


def peak_of(*words: object) -> tuple[int, Done]:
    """The greatest size of a command's process, in bytes."""
    done = succeed(*words, program=(sys.executable, "-c", _MEASURED))
    return 1024 * int(done.stdout.split("peak ")[1]), done


@pytest.mark.parametrize("documents", ["file", "line"])
def test_a_large_file(large: Path, tmp_path: Path, documents: str):
    words = ["text", "--input", large / "large.txt", "--documents", documents, "--tokenizer", large / "tokenizer.json"]
    peak, done = peak_of(*words, "--out", tmp_path / "out")
    assert "MB of text in" in done.stdout
    assert peak < LIMIT_BYTES, f"{peak / 1e6:.0f} MB for {TEXT_BYTES / 1e6:.0f} MB of text\n{done}"
    for shard in (tmp_path / "out").glob("*.h5"):
        shard.unlink()


def test_a_large_compressed_file(large: Path, tmp_path: Path):
    """It was one shard, held in memory: 786 MB. In shards of 4 million tokens: 300 MB."""
    words = ["text", "--input", large / "large.txt.zst", "--documents", "line", "--shard-tokens", 1 << 22]
    peak, done = peak_of(*words, "--tokenizer", large / "tokenizer.json", "--out", tmp_path / "out")
    shards = [shard.unlink() for shard in (tmp_path / "out").glob("train-00000*.h5")]
    assert len(shards) > 10
    assert peak < 500_000_000, f"{peak / 1e6:.0f} MB for {TEXT_BYTES / 1e6:.0f} MB of text\n{done}"


def test_a_tokenizer_is_trained_on_a_sample_of_a_compressed_file(large: Path, tmp_path: Path):
    """It was trained on all of it, whatever --sample-mb said: 3.3 GB, and 75 s instead of 3."""
    words = ["tokenizer", "--input", large / "large.txt.zst", "--vocab-size", 2000, "--sample-mb", 8]
    peak, done = peak_of(*words, "--out", tmp_path / "t.json")
    assert peak < 700_000_000, f"{peak / 1e6:.0f} MB for {TEXT_BYTES / 1e6:.0f} MB of text\n{done}"
    trained_on = json.loads((tmp_path / "t.record.json").read_text())["trained_on_bytes"]
    assert 7 << 20 <= trained_on <= 9 << 20
