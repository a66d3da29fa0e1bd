"""Memory does not grow with the corpus: some hundred megabytes of text in a part of that."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import succeed

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
    """``large.txt``, words of a vocabulary of thousands, no two parts of it alike, and ``tokenizer.json`` for it."""
    folder = tmp_path_factory.mktemp("large")
    draw = random.Random(1)
    words = ["".join(draw.choices("etaoinshrdlucmé漢字", k=draw.randint(1, 9))) for _ in range(3000)]
    block = "".join(f"{' '.join(draw.choices(words, k=60))}, NUMBER.\n" for _ in range(2400)).encode()
    build_tokenizer([block.decode()], "bpe", 2000).save(str(folder / "tokenizer.json"))
    with open(folder / "large.txt", "wb") as file:
        number = 0
        while file.tell() < TEXT_BYTES:
            number += 1
            file.write(block.replace(b"NUMBER", b"%06d" % number))
    yield folder
    (folder / "large.txt").unlink()  # pytest keeps its folders for a while


@pytest.mark.parametrize("documents", ["file", "line"])
def test_a_large_file(large: Path, tmp_path: Path, documents: str):
    words = ["text", "--input", large / "large.txt", "--documents", documents, "--tokenizer", large / "tokenizer.json"]
    done = succeed(*words, "--out", tmp_path / "out", program=(sys.executable, "-c", _MEASURED))
    assert "MB of text in" in done.stdout
    peak = 1024 * int(done.stdout.split("peak ")[1])
    assert peak < LIMIT_BYTES, f"{peak / 1e6:.0f} MB for {TEXT_BYTES / 1e6:.0f} MB of text\n{done}"
    for shard in (tmp_path / "out").glob("*.h5"):
        shard.unlink()
