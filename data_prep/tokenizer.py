"""Trains a tokenizer with Hugging Face `tokenizers` and writes one ``tokenizer.json``.

bpe    byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2): no text is unknown to it
char   one token for each character that the input holds; others become <|unk|>
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_prep.corpus import InputFile, corpus_sha256, documents
from hvdtrain.data.shards import END_OF_TEXT_TOKENS, read_json, write_json, writing
from hvdtrain.errors import ConfigError, DataError, OutputError

KINDS = ("bpe", "char")
END_OF_TEXT = END_OF_TEXT_TOKENS[0]
UNKNOWN = "<|unk|>"


def train_tokenizer(files: Sequence[InputFile], kind: str, vocab_size: int, out: Path) -> dict[str, Any]:
    """Train on all ``files`` and write ``out`` and, beside it, a record of how it was made (which is returned).

    A tokenizer that the same input and settings made before is left as it is.
    Errors: ConfigError where ``out`` holds another one or the vocabulary is too small.
    """
    record = {"kind": kind, "asked_vocab_size": vocab_size, "corpus_sha256": corpus_sha256(files)}
    record_path = out.with_name(f"{out.stem}.record.json")
    if out.exists():
        before = read_json(record_path) if record_path.exists() else {}
        if {key: before.get(key) for key in record} == record:
            return {**before, "reused": True}
        raise ConfigError(
            f"{out} exists and was not made from this input and these settings; remove it or choose another --out"
        )
    tokenizer = _train_bpe(files, vocab_size) if kind == "bpe" else _train_char(files)
    record |= {
        "vocab_size": tokenizer.get_vocab_size(),
        "trained_on_bytes": sum(file.bytes for file in files),
        "files": len(files),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {out.parent}: {error.strerror}") from None
    write_json(record_path, record)
    with writing(out) as temporary:
        temporary.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    return {**record, "reused": False}


def _train_bpe(files: Sequence[InputFile], vocab_size: int) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ConfigError(
            f"--vocab-size {vocab_size}: byte-level BPE needs more than {len(alphabet)} (bytes and {END_OF_TEXT})"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents(files), trainer)
    return tokenizer


def _train_char(files: Sequence[InputFile]) -> Tokenizer:
    characters: set[str] = set()
    for text in documents(files):
        characters.update(text)
    vocab = {token: number for number, token in enumerate([END_OF_TEXT, UNKNOWN, *sorted(characters)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return tokenizer


def load_tokenizer(path: Path) -> tuple[Tokenizer, int]:
    """An existing ``tokenizer.json`` and the id of its end-of-text token.

    Errors: DataError where it cannot be read or declares no end-of-text token.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read tokenizer {path}: {getattr(error, 'strerror', error)}") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer file: {error}") from None
    for name in END_OF_TEXT_TOKENS:
        if (number := tokenizer.token_to_id(name)) is not None:
            return tokenizer, number
    raise DataError(f"{path} declares no end-of-text token ({', '.join(END_OF_TEXT_TOKENS)})")
