"""Some of the text: to compare tokenizer libraries on, to size the shards, and to train a tokenizer."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence

from data_prep.corpus import InputFile
from data_prep.pieces import Piece, cut_files
from data_prep.readers import Reader, TextReader

_PLACES = 32  # where the comparison looks, spread evenly over the bytes
_PLACE_BYTES = 1 << 14
_TEXT_BYTES = 1 << 14  # of each text, at most
_COMPRESSED_FILES = 4  # read from their starts only
_TRAINING_PIECE = 1 << 20


def sample_texts(reader: Reader) -> list[bytes]:
    """Texts from places spread evenly over the input; the same on every rank."""
    plain = [file for file in reader.files if file.bytes and not file.compression]
    packed = [file for file in reader.files if file.bytes and file.compression]
    pieces = [Piece(file, 0, file.bytes, None) for file in packed[:: max(1, len(packed) // _COMPRESSED_FILES)]]
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


def training_texts(reader: TextReader, sample_bytes: int, seed: int) -> Iterator[str]:
    """Documents to train a tokenizer on: all of them, or about ``sample_bytes`` from places that ``seed`` draws."""
    total = sum(file.bytes for file in reader.files)
    if total <= sample_bytes:
        pieces: list[Piece] = reader.pieces(_TRAINING_PIECE)
    else:
        pieces = _drawn(cut_files(reader.files, _TRAINING_PIECE), sample_bytes, seed)
    for piece in pieces:
        for items in reader.items(piece, Counter()):
            yield from (item[0].decode() for item in items)


def _drawn(pieces: Sequence[Piece], sample_bytes: int, seed: int) -> list[Piece]:
    order = list(range(len(pieces)))
    random.Random(seed).shuffle(order)
    chosen, size = [], 0
    for number in order:
        if size >= sample_bytes:
            break
        chosen.append(number)
        size += pieces[number].weight
    return [pieces[number] for number in sorted(chosen)]
