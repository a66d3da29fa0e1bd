"""Cuts the input by bytes into pieces, and gathers pieces into units: one unit of work makes one shard of each split.

    files    |------ a ------|-- b --|--------------------- c ---------------------|
    pieces   |-------|-------|-------|---------|---------|---------|---------|-----|   cut where a document ends
    units    |---------- 0 ----------|---------- 1 ----------|--------- 2 ---------|   shards 00000, 00001, 00002

All this follows from the files' sizes and the options alone. So every rank knows the whole plan without asking others,
and the shards do not depend on how many ranks there are. Where exactly a document ends near a cut is found when a piece
is read.
"""

import hashlib
import heapq
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from data_prep.corpus import InputFile, files_sha256
from hvdtrain.errors import DataError

PIECE_BYTES = 1 << 24  # of text held in memory at once; a longer file counts as several documents
_LOOK_AHEAD = 1 << 16  # how far a cut in a long file may move to a better place
LONGEST_DOCUMENT = 1 << 28  # of a line
_COMPRESSED_WEIGHT = 4  # how many bytes of text a compressed byte is taken for, when work is shared


@dataclass(frozen=True)
class Piece:
    """Bytes ``begin`` to ``end`` of a file, both moved on to the next place where a document ends.

    ``split``: where its documents go, or None where that is decided for each. ``places``: of the text of a compressed
    file only these.
    """

    file: InputFile
    begin: int
    end: int
    split: str | None
    places: "Places | None" = None

    @property
    def is_stream(self) -> bool:
        """Must it be read from the start of its file, because the file or its partner cannot be cut?"""
        return self.file.is_stream or bool(self.file.partner and self.file.partner.is_stream)

    @property
    def is_whole(self) -> bool:
        """Is it all of its file?"""
        return self.begin == 0 and self.end == self.file.bytes

    @property
    def weight(self) -> int:
        return (self.end - self.begin) * (_COMPRESSED_WEIGHT if self.file.compression else 1)


@dataclass(frozen=True)
class Places:
    """Some of a text of unknown length: ``numbers`` (from 0) of its parts of ``step`` bytes."""

    step: int
    numbers: frozenset[int]


@dataclass(frozen=True)
class Unit:
    """Work that is done as a whole or not at all. ``number`` names its shards and its record."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def weight(self) -> int:
        return sum(piece.weight for piece in self.pieces)

    @property
    def stamp(self) -> str:
        """Changes when a file of this unit is written to, or when the unit is cut otherwise."""
        cuts = " ".join(f"{piece.begin}-{piece.end}-{piece.split}" for piece in self.pieces)
        files = files_sha256([piece.file for piece in self.pieces], with_time=True)
        return hashlib.sha256(f"{files} {cuts}".encode()).hexdigest()[:16]


def cut_files(files: Sequence[InputFile], piece_bytes: int = PIECE_BYTES, tail_fraction: float = 0.0) -> list[Piece]:
    """The pieces of all files in order.

    tail_fraction: this part of the bytes, at the end of all that is for training, goes to validation; a piece is cut
    in two for it.
    """
    pieces: list[Piece] = []
    train_left = int(sum(file.bytes for file in files if file.split is None) * (1 - tail_fraction))
    for file in files:
        step = file.bytes if file.is_stream else piece_bytes
        for begin in range(0, file.bytes, step or 1):
            piece = Piece(file, begin, min(begin + step, file.bytes), file.split)
            length = piece.end - piece.begin
            if tail_fraction and file.split is None:
                cut = piece.begin + min(max(train_left, 0), length)
                train_left -= length
                parts = (replace(piece, end=cut, split="train"), replace(piece, begin=cut, split="val"))
                pieces += [part for part in parts if part.end > part.begin]
            else:
                pieces.append(piece)
    return pieces


def gather(pieces: Sequence[Piece], unit_bytes: int) -> list[Unit]:
    """Units of about ``unit_bytes`` of text, at least a piece each."""
    units: list[Unit] = []
    taken: list[Piece] = []
    weight = 0
    for piece in pieces:
        if taken and weight + piece.weight > unit_bytes:
            units.append(Unit(len(units), tuple(taken)))
            taken, weight = [], 0
        taken.append(piece)
        weight += piece.weight
    if taken:
        units.append(Unit(len(units), tuple(taken)))
    return units


def share(weights: Sequence[int], size: int) -> list[list[int]]:
    """For each of ``size`` ranks the numbers of its work, in order. The heaviest goes first, to whom has least."""
    ranks: list[list[int]] = [[] for _ in range(size)]
    loads = [(0, rank) for rank in range(size)]
    for number in sorted(range(len(weights)), key=lambda number: (-weights[number], number)):
        load, rank = heapq.heappop(loads)
        ranks[rank].append(number)
        heapq.heappush(loads, (load + weights[number], rank))
    return [sorted(numbers) for numbers in ranks]


Read = Callable[[int, int], bytes]  # (offset, size) -> bytes, fewer only at the end


def chunks(piece: Piece, documents: str) -> Iterator[tuple[int, bytes]]:
    """The piece's bytes, about PIECE_BYTES at a time, cut where a document ends: (offset in the file, bytes)."""
    if piece.file.compression:
        yield from _stream(piece.file, documents, piece.places)
        return
    if piece.is_whole:  # as most are of a corpus of many files
        yield 0, _all_of(piece, piece.file.first_bytes(piece.end), piece.end)
        return
    with piece.file.open() as handle:

        def read(offset: int, size: int) -> bytes:
            handle.seek(offset)
            return piece.file.read(handle, size)

        begin, end = resolve(read, piece, documents)
        if end > begin:
            yield begin, _all_of(piece, read(begin, end - begin), end - begin)


def _all_of(piece: Piece, content: bytes, size: int) -> bytes:
    """Errors: DataError where the content is shorter than the file was."""
    if len(content) < size:
        raise DataError(f"{piece.file.path} became shorter while it was read")
    return content


def resolve(read: Read, piece: Piece, documents: str) -> tuple[int, int]:
    """Where the piece really begins and ends."""

    def at(nominal: int) -> int:
        if nominal in (0, piece.file.bytes):
            return nominal
        beyond = nominal % PIECE_BYTES
        if documents != "file" or not beyond:
            return min(piece.file.bytes, _end_of_document(piece.file, documents, read, nominal))
        # The cut of --val-split tail goes through a document where it must, but never back behind the cut before it.
        before = end_of_text(read, nominal - beyond) if beyond < min(nominal, _LOOK_AHEAD) else 0
        return max(before, end_of_character(read, nominal))

    return at(piece.begin), at(piece.end)


def _stream(file: InputFile, documents: str, places: Places | None) -> Iterator[tuple[int, bytes]]:
    """A compressed file, cut as the same file would be if it were plain."""
    step = places.step if places else PIECE_BYTES
    with file.open() as handle:
        offset, held, at_end = 0, b"", False
        while places is None or offset // step <= max(places.numbers):
            number = offset // step
            nominal = (number + 1) * step - offset
            wanted = nominal + 2 * _LOOK_AHEAD
            cut, missing = wanted, wanted - len(held)
            while True:  # hold more, until the document's end is in sight
                if missing > 0:
                    more = file.read(handle, missing)
                    at_end = not more
                    held += more
                buffer = held
                if len(held) > nominal:
                    cut = _end_of_document(file, documents, lambda at, size: buffer[at : at + size], nominal, offset)  # noqa: B023
                if cut < len(held) or at_end:
                    break
                missing = len(held)
            cut = min(cut, len(held))
            if not cut:
                return
            if places is None or number in places.numbers:
                yield offset, held[:cut]
            offset, held = offset + cut, held[cut:]


def line_blocks(file: InputFile, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """A file from its start, whole lines of about ``block_bytes`` at a time: (offset, bytes).

    Errors: DataError for a line that is far too long.
    """
    offset, parts = 0, []
    with file.open() as handle:
        while block := file.read(handle, block_bytes):
            whole, newline, rest = block.rpartition(b"\n")
            if newline:
                raw = b"".join([*parts, whole, newline])
                yield offset, raw
                offset, parts = offset + len(raw), []
            parts.append(rest)
            if sum(map(len, parts)) > LONGEST_DOCUMENT:
                raise DataError(
                    f"{file.path}: the line at byte {offset} is longer than {LONGEST_DOCUMENT >> 20} MiB; is it really "
                    "one sentence or one row a line?"
                )
        if raw := b"".join(parts):
            yield offset, raw


# --- where documents end ---------------------------------------------------------------------------------------------


BLANK_LINES = re.compile(rb"\n[ \t\r]*\n(?:[ \t\r]*\n)*")


# White space as a tokenizer sees it, which gathers it with a line end: that of one byte, of two, of three.
_SPACE = (rb"\s", rb"\xc2[\x85\xa0]", rb"(?:\xe1\x9a\x80|\xe2(?:\x80[\x80-\x8a\xa8\xa9\xaf]|\x81\x9f)|\xe3\x80\x80)")
_LINE_END = re.compile(b"".join(b"(?<!%b)" % space for space in _SPACE) + rb"\n(?!%b)(?=[\s\S]{3})" % b"|".join(_SPACE))


def _end_of_document(file: InputFile, documents: str, read: Read, nominal: int, offset: int = 0) -> int:
    try:
        return _END_OF_DOCUMENT[documents](read, nominal)
    except _TooLong:
        raise DataError(
            f"{file.path}: a document is longer than {LONGEST_DOCUMENT >> 20} MiB (from byte {offset + nominal}); "
            "is it really one document a line? (--documents)"
        ) from None


def end_of_text(read: Read, nominal: int) -> int:
    """A good place to cut a long text: at a line's end, or between words, or at least between characters.

    Best is a line end between two letters: there a tokenizer would cut anyway.
    """
    start = max(0, nominal - 3)
    window, first = read(start, _LOOK_AHEAD), nominal - start
    if match := _LINE_END.search(window, first):
        return start + match.end()
    if (newline := window.find(b"\n", first)) >= 0:
        return start + newline + 1
    if match := re.compile(rb"[ \t]").search(window, first):
        return start + match.start()
    return end_of_character(read, nominal)


def end_of_character(read: Read, nominal: int) -> int:
    """The next byte that begins a UTF-8 character."""
    window = read(nominal, 4)
    at_end = len(window) if len(window) < 4 else 0  # four in a row are of no character
    return nominal + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), at_end)


def end_of_line(read: Read, nominal: int) -> int:
    """After the next line end."""
    position = nominal
    while window := read(position, _LOOK_AHEAD):
        if (newline := window.find(b"\n")) >= 0:
            return position + newline + 1
        position += len(window)
        if position - nominal > LONGEST_DOCUMENT:
            raise _TooLong
    return position


def end_of_paragraph(read: Read, nominal: int) -> int:
    """After the next blank lines."""
    size = _LOOK_AHEAD
    while True:
        window = read(nominal, size)
        if match := BLANK_LINES.search(window):  # those beyond the window belong to the next piece, which skips them
            return nominal + match.end()
        if len(window) < size:
            return nominal + len(window)
        if size > LONGEST_DOCUMENT:
            raise _TooLong
        size *= 2


class _TooLong(Exception):
    pass


_END_OF_DOCUMENT = {"file": end_of_text, "line": end_of_line, "blank-line": end_of_paragraph}
