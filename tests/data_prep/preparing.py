"""Small inputs and what is made of them, by this process or by ranks that are its threads; and plain ways to read."""

import bz2
import codecs
import gzip
import lzma
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import h5py
import pytest
import zstandard
from hypothesis import strategies as st
from threads import on_ranks
from tokenizers import Tokenizer

from data_prep import aligned, pieces, readers, tables
from data_prep.corpus import InputFile
from data_prep.finding import Search
from data_prep.prepare import Kind, PrepareOptions, prepare
from data_prep.readers import Item, Reader, TextReader
from data_prep.text import TextKind
from data_prep.tokenizer_file import load_tokenizer
from hvdtrain.data.shards import Manifest, read_manifest

EOS = 0  # of every tokenizer that build_tokenizer makes

# Everything that a careless reader, splitter or normaliser would lose or change.
ODD_TEXTS = [
    "Hello, world.\n",
    "漢字とかなの文章。\n二行目\r\n",
    "e\u0301 is two characters, é is one; ﬁ is one; \u202eright to left\u202c \u200f\u200e\n",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1ef\U0001f1f5 \U0001f44d\U0001f3fd \U0001d54f",
    "BOM \ufeffwithin and\ttab and\u3000wide space and no line end",
    "a line\u2028that is\u2029one, \x85 and \x0b and \x0c too",
    "private \ue000 \U000f0000 and the last \U0010ffff, \ufffd and \ufffe",
    "It says <|endoftext|> and <|unk|> in the text",
    "עברית and العربية ١٢٣ हिन्दी ไทย 한글",
    "x",
    " \n \n\n",
]

# What a cut may fall into: line ends of both kinds, blank lines, white space of several bytes, long words, characters.
FRAGMENTS = st.sampled_from(
    ["\n", "\r\n", "\n\n", "\n \t\n", "\n\n\n\n", "\r", " ", "\t", "\u3000", "\u2028", "\ufeff", "a", "word", "é",
     "漢字", "\U0001f468\u200d\U0001f469", "e\u0301", "x" * 40, "漢" * 15, "\n\u3000\u3000"]
)  # fmt: skip
TEXTS = st.lists(FRAGMENTS, min_size=1, max_size=60).map(lambda parts: "".join(parts).encode())


# --- files -------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str | bytes) -> Path:
    """``write(folder, **{"a/b.txt": "text"})``; compressed as the name says."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(compressed(content if isinstance(content, bytes) else content.encode(), path.suffix))
    return folder


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content, 1, mtime=0)
    if suffix == ".bz2":
        return bz2.compress(content, 1)
    if suffix == ".xz":
        return lzma.compress(content, preset=0)
    return zstandard.ZstdCompressor(1, write_checksum=True).compress(content) if suffix == ".zst" else content


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a preparation with its bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


def files_of(*paths: Path, split: str | None = None) -> list[InputFile]:
    return Search().files(paths, split)


# --- plain ways to read, to compare with -------------------------------------------------------------------------


def plain_documents(content: bytes, documents: str) -> list[bytes]:
    """What the documents of a whole file are, said as simply as can be."""
    content = content.removeprefix(codecs.BOM_UTF8)
    if documents == "file":
        return [content] if content else []
    lines = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    if documents == "line":
        return [line for line in lines if line.strip()]
    blocks = groupby(content.split(b"\n"), key=lambda line: not line.strip(b" \t\r"))
    paragraphs = [b"\n".join(block).strip(b"\r\n") for is_blank, block in blocks if not is_blank]
    return [paragraph for paragraph in paragraphs if paragraph.strip()]


def items_of(reader: Reader, unit_bytes: int = 1 << 30, counts: Counter | None = None) -> list[Item]:
    """All items, piece by piece."""
    counts = Counter() if counts is None else counts
    cut = reader.pieces(unit_bytes, 0.0)
    return [item for piece in cut for items in reader.items(piece, counts) for item in items]


@contextmanager
def small_pieces(piece_bytes: int, look_ahead: int = 8) -> Iterator[None]:
    """Files are cut as if 16 MiB were only so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pieces, readers, tables, aligned):
            patch.setattr(module, "PIECE_BYTES", piece_bytes)
        patch.setattr(pieces, "_LOOK_AHEAD", look_ahead)
        yield


# --- preparing ---------------------------------------------------------------------------------------------------


def text_kind(files: Sequence[InputFile], documents: str = "file", least: int = 0, most: int = 0, **reader) -> TextKind:
    return TextKind(TextReader(files, documents, **reader), EOS, least, most)


def run(make: Callable[[], Kind], tokenizer: Path, out: Path, ranks: int = 1, **options: Any) -> tuple[Manifest, bool]:
    """One preparation by so many ranks, each with a kind of its own."""
    settings = PrepareOptions(**{"val_fraction": 0.0, **options})
    found = on_ranks(ranks, lambda one: prepare(make(), settings, load_tokenizer(tokenizer), out, one))
    assert all(one == found[0] for one in found)
    return found[0]


def shards_of(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The datasets of each shard of a split, as lists, in the manifest's order."""
    for info in read_manifest(folder).split(split):
        with h5py.File(folder / info.file) as file:
            yield {name: file[name][:].tolist() for name in file}


def token_rows(folder: Path, split: str, side: str = "") -> list[list[int]]:
    """The tokens of each document of a split; ``side``: ``source_`` or ``target_``."""
    rows = []
    for shard in shards_of(folder, split):
        tokens, ends = shard[f"{side}tokens"], shard[f"{side}doc_offsets"]
        assert (ends[0], ends[-1]) == (0, len(tokens))
        rows += [tokens[start:end] for start, end in pairwise(ends)]
    return rows


def texts_of(folder: Path, split: str, side: str = "") -> list[str]:
    """The documents of a split, back from tokens; each must end with the end-of-text token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = token_rows(folder, split, side)
    assert all(row[-1] == EOS for row in rows)
    return [tokenizer.decode(row[:-1], skip_special_tokens=False) for row in rows]
