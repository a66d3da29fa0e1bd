"""What a vocabulary is worth on a text: coverage, bytes a token, which tokens are used most and least."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from data_prep.roles import unknown_token

_AT_ONCE = 1 << 18  # characters encoded at a time; each may take some hundred bytes of memory
_SHOWN = 10


@dataclass(frozen=True)
class VocabularyReport:
    """``coverage``: the share of characters that are not unknown. ``most_used`` and ``least_used``: (token, count),
    the latter the rarest first, among those that are used at all; tokens are written so that one can read them.
    """

    vocab_size: int
    tokens: int
    characters: int
    text_bytes: int
    coverage: float
    never_used: int
    most_used: tuple[tuple[str, int], ...]
    least_used: tuple[tuple[str, int], ...]

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, self.tokens)

    @property
    def characters_per_token(self) -> float:
        return self.characters / max(1, self.tokens)

    def text(self) -> str:
        """For a terminal."""
        lines = [
            f"vocabulary   {self.vocab_size:,} tokens, {self.never_used:,} of them never used",
            f"text         {self.text_bytes:,} bytes, {self.characters:,} characters, {self.tokens:,} tokens",
            f"a token      {self.bytes_per_token:.2f} bytes, {self.characters_per_token:.2f} characters",
            f"coverage     {self.coverage:.4%} of the characters",
        ]
        # One width for both tables. The token comes last: how wide a terminal draws 猫 is not known.
        width = max((len(f"{count:,}") for _, count in self.most_used), default=0)
        for title, rows in (("most used", self.most_used), ("least used", self.least_used)):
            lines.append(f"{title}:")
            lines += [f"  {count:>{width},}  {count / self.tokens:8.4%}  {token}" for token, count in rows]
        return "\n".join(lines)


def vocabulary_report(tokenizer: Tokenizer, texts: Iterable[str]) -> VocabularyReport:
    """Encode ``texts`` and count; memory does not grow with them. The name of a special token in a text is text."""
    fields = json.loads(tokenizer.to_str())  # the caller's stays as it is
    if "dropout" in fields["model"]:
        fields["model"]["dropout"] = None
    tokenizer = Tokenizer.from_str(json.dumps(fields))
    tokenizer.encode_special_tokens = True
    counts = np.zeros(max(tokenizer.get_vocab().values(), default=0) + 1, np.int64)  # ids may have gaps
    unknown = unknown_token(fields)
    unknown_id = None if unknown is None else tokenizer.token_to_id(unknown)
    # Only the slower one tells which characters a token stands for.
    encode = tokenizer.encode_batch_fast if unknown_id is None else tokenizer.encode_batch
    characters = text_bytes = unknown = 0
    for batch in _batches(texts):
        characters += sum(map(len, batch))
        text_bytes += sum(len(text.encode()) for text in batch)
        encodings = encode(batch, add_special_tokens=False)
        ids = np.concatenate([np.array(encoding.ids, np.int64) for encoding in encodings])
        counts += np.bincount(ids, minlength=len(counts))
        if unknown_id is not None and (ids == unknown_id).any():
            unknown += sum(_characters_of(unknown_id, encoding) for encoding in encodings)
    used = np.flatnonzero(counts)

    def rows(order: np.ndarray) -> tuple[tuple[str, int], ...]:
        numbers = used[np.lexsort((used, order))][:_SHOWN]  # of equals, the one with the lower id first
        return tuple((readable(tokenizer, int(number)), int(counts[number])) for number in numbers)

    vocab_size = tokenizer.get_vocab_size()
    return VocabularyReport(
        vocab_size=vocab_size,
        tokens=int(counts.sum()),
        characters=characters,
        text_bytes=text_bytes,
        coverage=1 - unknown / max(1, characters),
        never_used=vocab_size - len(used),
        most_used=rows(-counts[used]),
        least_used=rows(counts[used]),
    )


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        for part in _parts(text):
            batch.append(part)
            size += len(part)
            if size >= _AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _parts(text: str) -> Iterator[str]:
    """A long text in parts, cut after a line end where there is one: tokenizers cut there anyway."""
    begin = 0
    while len(text) - begin > _AT_ONCE:
        end = text.rfind("\n", begin, begin + _AT_ONCE) + 1 or begin + _AT_ONCE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _characters_of(unknown_id: int, encoding) -> int:
    """How many characters of the text are unknown: a token may stand for one, or for a whole word."""
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    return sum(end - begin for number, (begin, end) in pairs if number == unknown_id)


# --- tokens that one can read ----------------------------------------------------------------------------------------

# GPT-2's letters for bytes: those that print stand for themselves, the others follow from U+0100 on.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTING}
_BYTES |= {chr(0x100 + place): byte for place, byte in enumerate(sorted({*range(256)} - {*_PRINTING}))}


def readable(tokenizer: Tokenizer, number: int) -> str:
    """A token as one line of text:  ␣the  \\n  漢  <|endoftext|>  and \\xe6\\xbc, where it is part of a character."""
    token = tokenizer.id_to_token(number)
    is_byte_level = b'"ByteLevel"' in tokenizer.decoder.__getstate__() if tokenizer.decoder else False
    if is_byte_level and number not in tokenizer.get_added_tokens_decoder() and set(token) <= _BYTES.keys():
        token = bytes(_BYTES[letter] for letter in token).decode("utf-8", "surrogateescape")
    return "".join(map(_visible, token))


def _visible(character: str) -> str:
    if character == " ":
        return "␣"
    if "\udc80" <= character <= "\udcff":  # a byte, by surrogateescape
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character if character.isprintable() and character != "\\" else repr(character)[1:-1]
