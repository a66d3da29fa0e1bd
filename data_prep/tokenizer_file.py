"""A ``tokenizer.json`` that exists, and what has to be changed in it before text is encoded for good.

Notes say what was changed. The changed file lies beside the shards as their ``tokenizer.json``, so that a prompt later
becomes the same tokens as the same text did. A file in which nothing needs to change is copied byte for byte.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from data_prep.roles import Vocabulary, claims_beside, find_roles, unknown_token
from hvdtrain.errors import ConfigError, DataError

_BYTE_LETTERS = frozenset(pre_tokenizers.ByteLevel.alphabet())
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class TokenizerFile:
    """``content``: of the file, changed where it had to be. ``special``: role -> id. ``notes``: for the user.

    ``unknown``: what becomes of text that the vocabulary lacks: ``never`` happens (all bytes have tokens), ``token``
    (the one with ``unknown_id``), ``dropped`` or ``error``.
    """

    path: Path
    content: bytes
    special: dict[str, int]
    notes: tuple[str, ...]
    unknown: str
    unknown_id: int | None

    def fields(self) -> dict[str, Any]:
        return json.loads(self.content)

    def tokenizer(self) -> Tokenizer:
        """A new one, to which the name of a special token in a text is text."""
        return _made(self.content.decode())


def load_tokenizer(path: Path, asked: Mapping[str, str] | None = None) -> TokenizerFile:
    """An existing file. asked: role -> name of its token, where the user said so; see ``roles`` for where not.

    Errors: DataError where it cannot be read or nothing in it ends a document; ConfigError where the user must choose.
    """
    try:
        content = path.read_bytes()
        fields = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not a tokenizer file: {error}") from None
    try:
        tokenizer = _made(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path} is not a tokenizer file: {error}") from None
    asked = asked or {}
    roles, notes = find_roles(fields, asked, claims_beside(path, fields), path)
    changes = [*_without_chance(fields), *_without_limits(fields), *_told_of_unknown(fields, asked)]
    changes += _marked(fields, {name for role, name in roles.items() if role != "unk"})
    changes += _names_are_text(fields, tokenizer if not changes else _made(json.dumps(fields)))
    ids = Vocabulary(fields).ids
    unknown = unknown_token(fields)
    return TokenizerFile(
        path,
        json.dumps(fields, ensure_ascii=False, indent=2).encode() if changes else content,
        {role: ids[name] for role, name in roles.items()},
        (*notes, *changes),
        _what_of_unknown(fields),
        None if unknown is None else ids[unknown],
    )


def _made(content: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True
    return tokenizer


# --- what is changed: each changes ``fields`` and yields what it did --------------------------------------------------


def _without_chance(fields: dict[str, Any]) -> Iterable[str]:
    if dropout := fields["model"].get("dropout"):
        fields["model"]["dropout"] = None
        yield f"its dropout of {dropout} is switched off, with which a text would have other tokens each time"


def _without_limits(fields: dict[str, Any]) -> Iterable[str]:
    """Files for sentence embeddings say to cut each text after 128 tokens, and to fill it up."""
    for what in ("truncation", "padding"):
        if fields.get(what):
            fields[what] = None
            yield f"its {what} of texts is switched off"


def _told_of_unknown(fields: dict[str, Any], asked: Mapping[str, str]) -> Iterable[str]:
    name, model = asked.get("unk"), fields["model"]
    if name is None or name == unknown_token(fields):
        return
    ids = Vocabulary({"model": model}).ids
    if name not in ids:
        raise ConfigError(f"--unk {name}: only a token of the model's own vocabulary can stand for what is unknown")
    model.update({"unk_id": ids[name]} if _type(model) == "Unigram" else {"unk_token": name})
    yield f"{name} stands for what its vocabulary lacks"


def _marked(fields: dict[str, Any], names: set[str]) -> Iterable[str]:
    """A token with a role that is not marked special would be found in texts."""
    vocabulary, added = Vocabulary(fields), fields.setdefault("added_tokens", [])
    for name in sorted(names - {*vocabulary.special}, key=lambda one: vocabulary.ids[one]):
        if name in vocabulary.added:
            next(token for token in added if token["content"] == name)["special"] = True
        else:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": vocabulary.ids[name], "content": name, **flags, "special": True})
            added.sort(key=lambda token: token["id"])
        yield f"{name} is marked special, so that in a text it is text"


def _names_are_text(fields: dict[str, Any], tokenizer: Tokenizer) -> Iterable[str]:
    """Some models find special tokens by themselves: the best way to write "a</s>" in T5's pieces is "a" and </s>.

    A step more, last before the model, cuts such a name after its first character:  a</s>  ->  a < /s>
    """
    found = _found_in_text(fields, tokenizer)
    if not found:
        return
    rest: dict[str, list[str]] = {}
    for name in found:
        rest.setdefault(name[0], []).append(re.escape(name[1:]))
    pattern = "|".join(f"{re.escape(first)}(?=(?:{'|'.join(ends)}))" for first, ends in rest.items())
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    before = fields.get("pre_tokenizer")
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [before, step]} if before else step
    if still := _found_in_text(fields, _made(json.dumps(fields))):
        raise DataError(f"the text {still[0]!r} would become the special token of that name; no way around it is known")
    names = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
    yield f"{names} in a text is kept apart from the special token of that name"


def _found_in_text(fields: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Special tokens that their own name in a text becomes, or what it stands for. tokenizer: made of ``fields``."""
    vocabulary = Vocabulary(fields)
    found = []
    for name in vocabulary.special:
        meant = tokenizer.decoder.decode([name]) if tokenizer.decoder else name  # " the" of Ġthe
        for text in (name, f"a {name} b", f"a{name}b", meant, f"a{meant} b"):
            try:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
            except Exception:  # "a" may be unknown, and no token for that
                continue
            if vocabulary.ids[name] in ids and name != unknown_token(fields):
                found.append(name)
                break
    return found


# --- what is unknown -------------------------------------------------------------------------------------------------


def _what_of_unknown(fields: Mapping[str, Any]) -> str:
    model = fields["model"]
    vocab = Vocabulary(fields).ids.keys()
    if _type(model) in ("BPE", "Unigram") and not model.get("continuing_subword_prefix"):
        by_letters = '"ByteLevel"' in json.dumps([fields.get("pre_tokenizer"), fields.get("normalizer")])
        if (by_letters and vocab >= _BYTE_LETTERS) or (model.get("byte_fallback") and vocab >= _BYTE_TOKENS):
            return "never"
    if unknown_token(fields) is not None:
        return "token"
    # Byte-pair encoding goes on without what it does not know, unless it names a token that is not there.
    return "dropped" if _type(model) == "BPE" and model.get("unk_token") is None else "error"


def _type(model: Mapping[str, Any]) -> str:
    """``BPE``, ``Unigram``, ``WordPiece`` or ``WordLevel``; old files do not say it."""
    if "type" in model:
        return model["type"]
    if "merges" in model:
        return "BPE"
    return "Unigram" if isinstance(model["vocab"], list) else "WordLevel"


def marking(fields: Mapping[str, Any]) -> tuple[Tokenizer, int]:
    """The same with a token of its own, whose id is returned, for each character that byte-pair encoding would drop."""
    vocab = fields["model"]["vocab"]
    mark = max(Vocabulary(fields).ids.values()) + 1
    model = {**fields["model"], "vocab": {**vocab, "\0": mark}, "unk_token": "\0", "fuse_unk": False}
    return _made(json.dumps({**fields, "model": model})), mark
