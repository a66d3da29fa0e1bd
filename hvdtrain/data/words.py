"""Which tokens go on with a word that another token began? A tokenizer's file says it in one of these ways:

WordPiece       un ##break ##able      what goes on begins with ##
byte-level      Ġun break able         what begins a word brings the white space before it, as letters for bytes
SentencePiece   ▁un break able         the same, with one letter for the space
WordLevel       unbreakable            a token is a word
characters      u n b r e a k ...      the same as byte-level, with the white space as it is
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdtrain.errors import DataError
from hvdtrain.files import read_text

_BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "č", "ĉ")  # space, line feed, carriage return, tab


def continues_word(tokenizer_path: Path, vocab_size: int) -> np.ndarray:
    """For each token id of a `tokenizers` file whether it goes on with the word before it: bool [vocab_size].

    Special tokens and ids without a token never do. Errors: DataError where the file is none, or does not say it.
    """
    try:
        fields = json.loads(read_text(tokenizer_path))
        model = fields["model"]
        vocab = model["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {row[0]: number for number, row in enumerate(vocab)}
        added = {token["id"] for token in fields.get("added_tokens", [])}
        begins = _begins_word(fields)
    except OSError as error:
        raise DataError(f"cannot read {tokenizer_path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{tokenizer_path} is not a tokenizer file ({type(error).__name__}: {error})") from None
    if begins is None:
        raise DataError(
            f"{tokenizer_path} marks where words end, not where they begin, so that a token alone does not tell if "
            "it goes on with a word; whole words need a tokenizer that marks what begins or goes on"
        )
    found = np.zeros(vocab_size, bool)
    for token, number in ids.items():
        if number < vocab_size and number not in added:
            found[number] = not begins(token)
    return found


def _begins_word(fields: Mapping[str, Any]) -> Callable[[str], bool] | None:
    """None: it cannot be told."""
    model = fields["model"]
    if model.get("type") == "WordLevel":
        return lambda token: True
    if prefix := model.get("continuing_subword_prefix"):
        return lambda token: not token.startswith(prefix)
    if model.get("end_of_word_suffix"):
        return None
    steps = json.dumps([fields.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    if '"ByteLevel"' in steps:
        return lambda token: token.startswith(_BYTE_LEVEL_SPACES)
    if '"Metaspace"' in steps or '"▁"' in steps:
        return lambda token: token.startswith("▁")
    return lambda token: token[:1].isspace()
