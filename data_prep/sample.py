"""Some of the text: to compare tokenizer libraries on, to size the shards, and to train a tokenizer."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from data_prep.corpus import InputFile
from data_prep.pieces import PIECE_BYTES, Piece, Places, cut_files
from data_prep.readers import Reader, TextReader

_PLACES = 32  # where the comparison looks, spread evenly over the bytes
_PLACE_BYTES = 1 << 14
_TEXT_BYTES = 1 << 14  # of each text, at most
_COMPRESSED_FILES = 4  # read from their starts only
_TRAINING_PIECE = 1 << 20
_SPREAD = 4  # a compressed file is read through for this many times what is taken of it


def sample_texts(reader: Reader) -> list[bytes]:
    """Texts from places spread evenly over the input; the same on every rank."""
    plain = [file for file in reader.files if file.bytes and not file.is_stream]
    packed = [file for file in reader.files if file.bytes and file.is_stream]
    chosen = packed[:: max(1, len(packed) // _COMPRESSED_FILES)]
    pieces = [Piece(file, 0, file.bytes, None, Places(_PLACE_BYTES, frozenset({0}))) for file in chosen]
    pieces += _places(plain, reader)
    texts: list[bytes] = []
    for piece in pieces:
        items = next((batch for batch in reader.items(piece, Counter()) if batch), [])
        size = 0
        for text in (text for item in items for text in item):
            texts.append(_head(text))
            size += len(texts[-1])
            if size >= _PLACE_BYTES:
                break
    return texts


def _places(files: Sequence[InputFile], reader: Reader) -> Iterator[Piece]:
    total = sum(file.bytes for file in files)
    wanted = [total * place // _PLACES for place in range(_PLACES)]
    before, used = 0, set()
    for file in files:
        for at in (at - before for at in wanted if before <= at < before + file.bytes):
            # Whole files where they are small; the reader knows how to begin within a large one.
            begin = 0 if file.bytes <= _PLACE_BYTES or not reader.can_begin_anywhere else at
            if (file.name, begin) not in used:
                used.add((file.name, begin))
                yield Piece(file, begin, min(begin + _PLACE_BYTES, file.bytes), None)
        before += file.bytes


def _head(text: bytes) -> bytes:
    """The first of a text, without half a character at its end."""
    return text if len(text) <= _TEXT_BYTES else text[:_TEXT_BYTES].decode("utf-8", "ignore").encode()


def training_texts(reader: TextReader, sample_bytes: int, seed: int, counts: Counter | None = None) -> Iterator[str]:
    """Documents to train a tokenizer on: all of them, or about ``sample_bytes`` from places that ``seed`` draws.

    counts: what is left out or mended is added there.
    """
    counts = Counter() if counts is None else counts
    for piece in _training_pieces(reader, sample_bytes, seed):
        for items in reader.items(piece, counts):
            yield from (item[0].decode() for item in items)


def _training_pieces(reader: TextReader, sample_bytes: int, seed: int) -> list[Piece]:
    pieces = cut_files(reader.files, _TRAINING_PIECE)
    total = sum(piece.weight for piece in pieces)  # of compressed files only guessed
    if total > sample_bytes:
        return _drawn(pieces, sample_bytes, random.Random(seed))
    return [
        replace(piece, places=_first(piece.weight * sample_bytes // total)) if piece.is_stream else piece
        for piece in reader.pieces(_TRAINING_PIECE)
    ]


def _first(text_bytes: int) -> Places:
    """The first ``text_bytes`` of a text: all of it, unless it is far longer than its compressed size lets expect."""
    step = min(PIECE_BYTES, text_bytes)
    return Places(step, frozenset(range(-(-text_bytes // step))))


def _drawn(pieces: Sequence[Piece], sample_bytes: int, draw: random.Random) -> list[Piece]:
    """Draw some of the pieces. A compressed file counts as the pieces that its text may have. Where that ends is not
    known, and reading up to there takes time, so those drawn of it are spread over its first part.
    """
    slots = [-(-piece.weight // _TRAINING_PIECE) for piece in pieces]  # of a plain piece 1
    order = [number for number, count in enumerate(slots) for _ in range(count)]
    draw.shuffle(order)
    chosen: Counter[int] = Counter()
    size = 0
    for number in order:
        if size >= sample_bytes:
            break
        chosen[number] += 1
        size += min(pieces[number].weight, _TRAINING_PIECE)
    found = []
    for number, count in sorted(chosen.items()):
        piece = pieces[number]
        if piece.is_stream:
            numbers = draw.sample(range(min(slots[number], _SPREAD * count)), count)
            piece = replace(piece, places=Places(min(piece.weight, _TRAINING_PIECE), frozenset(numbers)))
        found.append(piece)
    return found
