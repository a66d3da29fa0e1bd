"""Which token of a tokenizer ends a document, which begins one, which stands for what is unknown?

The first that knows decides:

    --eos NAME                  the user, who may name any token
    shards                      whose tokenizer.json it is: their manifest.json
    the folder                  of a tokenizer.json: tokenizer_config.json, special_tokens_map.json and
                                generation_config.json as Hugging Face has them
    the tokenizer itself        its model's unknown token; what its post-processor puts around a text
    known names                 of tokens that are marked special, and no others: Gemma 3 has HTML's </s> too, as text

The end of a document is preferred to the end of a turn (Llama 3's <|eot_id|>, Qwen's <|im_end|>), at which no text
ends. Where it is not certain, the user is asked: a wrong token would put borders where there are none.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError, DataError
from hvdtrain.files import read_json

# Role -> names by which it is known, ours first.
SPECIAL_TOKENS = {
    "eos": (
        "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<EOS>", "<EOS_TOKEN>", "<EOT>",
        "<｜end▁of▁sentence｜>",
    ),
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<PAD>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>"),
    "bos": (
        "<|bos|>", "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "<BOS>", "<BOS_TOKEN>", "<SOS>",
        "<｜begin▁of▁sentence｜>",
    ),
    "unk": ("<|unk|>", "<unk>", "[UNK]", "<UNK>"),
    "mask": ("<|mask|>", "<mask>", "[MASK]"),
    "sep": ("<|sep|>", "<sep>", "[SEP]"),
    "cls": ("<|cls|>", "<cls>", "[CLS]"),
}  # fmt: skip
TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "<|end|>",
    "<|return|>", "<|EOT|>", "[EOT]",
)  # fmt: skip
_SHOWN = 20
_SHARDS = "manifest.json"

Claims = Sequence[tuple[str, Mapping[str, str]]]  # (who says so, role -> name)


class Vocabulary:
    """Names and ids of a tokenizer file's tokens. ``special``: the names of those that are marked so."""

    def __init__(self, fields: Mapping[str, Any]):
        model, added = fields["model"], fields.get("added_tokens", [])
        vocab = model["vocab"]
        self.ids = dict(vocab) if isinstance(vocab, dict) else {row[0]: number for number, row in enumerate(vocab)}
        self.ids |= {token["content"]: token["id"] for token in added}
        self.added = [token["content"] for token in added]
        self.special = [token["content"] for token in added if token.get("special")]


def find_roles(
    fields: Mapping[str, Any], asked: Mapping[str, str] | None = None, folder: Claims = (), path: Path = Path("it")
) -> tuple[dict[str, str], list[str]]:
    """Role -> name of its token, for the roles that there are (``eos`` always), and notes on what was chosen.

    fields: of a tokenizer file; asked: by the user; folder: see ``claims_beside``; path: for messages.
    Errors: ConfigError where a name that was asked for is unknown, or where there is a choice that must be asked for;
    DataError where nothing is known to end a document, or the folder names an end that the tokenizer lacks.
    """
    vocabulary = Vocabulary(fields)
    asked = asked or {}
    for role, name in asked.items():
        if name not in vocabulary.ids:
            raise ConfigError(f"--{role} {name}: {path} has no such token; {_offer(vocabulary, name)}")
    notes: list[str] = []
    # Shards go on as they began. What stands for the unknown is the model's own business.
    before = {role: name for role, name in dict(folder).get(_SHARDS, {}).items() if role not in (*asked, "unk")}
    if "eos" in before:
        notes.append(f"documents end with {before['eos']}, as those of the shards beside it; another: --eos NAME")
    decided = {**before, **asked}
    folder = [(file, {role: name for role, name in names.items() if role not in decided}) for file, names in folder]
    claims = [*_known_to(vocabulary, folder, path, notes), *_of_itself(fields, vocabulary)]
    found = {}
    for role, known in SPECIAL_TOKENS.items():
        claimed = [names[role] for _, names in claims if role in names]
        named = [name for name in known if name in vocabulary.special]
        if role in decided:
            found[role] = decided[role]
        elif role == "eos":
            found[role] = _end(vocabulary, claimed, named, path, notes)
        elif claimed or named:
            found[role] = claimed[0] if claimed else _only(role, named, path)
    return found, notes


def _end(vocabulary: Vocabulary, claimed: list[str], named: list[str], path: Path, notes: list[str]) -> str:
    turns = [name for name in TURN_ENDS if name in vocabulary.special]
    ends = [name for name in claimed if name not in TURN_ENDS]
    if ends or named:
        end = ends[0] if ends else _only("eos", named, path)
        others = [name for name in dict.fromkeys([*claimed, *named, *turns]) if name != end]
    elif claimed or turns:
        end, others = claimed[0] if claimed else _only("eos", turns, path), []
        notes.append(f"documents end with {end}, which is known as the end of a turn; another: --eos NAME")
    elif last := [name for name in SPECIAL_TOKENS["sep"] if name in vocabulary.special]:  # BERT has nothing else
        end, others = _only("eos", last, path), []
    else:
        raise DataError(
            f"{path} has no token that is known to end a document; name one with --eos NAME: {_offer(vocabulary)}"
        )
    if others:
        notes.append(f"documents end with {end}, not with {' or '.join(others)}; another: --eos NAME")
    return end


def _only(role: str, names: Sequence[str], path: Path) -> str:
    if len(names) > 1:
        raise ConfigError(f"{path} has several tokens that may be its {role}: {', '.join(names)}; give --{role} NAME")
    return names[0]


def _offer(vocabulary: Vocabulary, name: str = "") -> str:
    """Tokens that may have been meant."""
    close = difflib.get_close_matches(name, vocabulary.added, cutoff=0.5) if name else []
    if close:
        return f"close to it: {', '.join(close)}"
    names = vocabulary.special or vocabulary.added or sorted(vocabulary.ids, key=lambda one: vocabulary.ids[one])
    return f"it has: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"


# --- who says so -----------------------------------------------------------------------------------------------------


def claims_beside(path: Path, fields: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """What the other files of the folder of a ``tokenizer.json`` say. Errors: DataError where one is damaged."""
    if path.name != "tokenizer.json":
        return []
    names = {number: name for name, number in Vocabulary(fields).ids.items()}
    found = []
    for file in (_SHARDS, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (path.parent / file).exists():
            said = read_json(path.parent / file)
            found.append((file, {role: name for role in SPECIAL_TOKENS if (name := _said(said, role, names))}))
    return found


def _said(said: Mapping[str, Any], role: str, names: Mapping[int, str]) -> str | None:
    """The name of a role's token: as text, as an object with its text, or by its id."""
    value = said.get(f"{role}_token")
    if isinstance(value, Mapping):
        value = value.get("content")
    if isinstance(value, str):
        return value
    shards = said.get("special_tokens")  # of a manifest
    number = shards.get(role) if isinstance(shards, Mapping) else said.get(f"{role}_token_id")
    # Several ids are where generation stops; it is not known which of them ends a document.
    return names.get(number) if type(number) is int else None


def _known_to(vocabulary: Vocabulary, folder: Claims, path: Path, notes: list[str]) -> Iterator[tuple[str, dict]]:
    """The folder's claims, without those on tokens that the tokenizer lacks."""
    for file, names in folder:
        for role, name in names.items():
            if name not in vocabulary.ids:
                message = f"{file} names {name} as {role}, which {path} has not"
                if role == "eos":
                    raise DataError(f"{message}; do they belong together? --eos NAME decides: {_offer(vocabulary)}")
                notes.append(message)
        # GPT-2's folder names its end of text for the unknown, which it does not have.
        yield file, {role: name for role, name in names.items() if name in vocabulary.ids and role != "unk"}


def _of_itself(fields: Mapping[str, Any], vocabulary: Vocabulary) -> Iterator[tuple[str, dict[str, str]]]:
    if (unknown := unknown_token(fields)) is not None:
        yield "its model", {"unk": unknown}
    for processor in _flat(fields.get("post_processor")):
        if processor["type"] in ("BertProcessing", "RobertaProcessing"):
            around = [[processor["cls"][0]], [processor["sep"][0]]]
        elif processor["type"] == "TemplateProcessing":
            around = _around(processor)
        else:
            continue
        said = {}
        for names, (usual, other) in zip(around, (("bos", "cls"), ("eos", "sep")), strict=True):
            names = [name for name in names if name in vocabulary.ids]
            known = [name for name in names if name in SPECIAL_TOKENS[usual] + SPECIAL_TOKENS[other]]
            # A token of any name counts where there is none of a known one: a language may stand there as well.
            if not known and not {*SPECIAL_TOKENS[usual]} & {*vocabulary.special}:
                known = names
            said |= {other if name in SPECIAL_TOKENS[other] else usual: name for name in known[:1]}
        yield "its post-processor", said


def _around(template: Mapping[str, Any]) -> list[list[str]]:
    """What a template puts before a text, and what after it."""
    around: list[list[str]] = [[], []]
    side = 0
    for part in template["single"]:
        if "Sequence" in part:
            side = 1
        else:
            name = part["SpecialToken"]["id"]
            around[side] += template["special_tokens"].get(name, {}).get("tokens", [name])
    return around


def _flat(step: Any) -> Iterator[Mapping[str, Any]]:
    """A post-processor, or those of a sequence."""
    if step is not None:
        yield from (one for part in step["processors"] for one in _flat(part)) if step["type"] == "Sequence" else [step]


def unknown_token(fields: Mapping[str, Any]) -> str | None:
    """The token that the model puts in place of what it does not know, if it has one."""
    model = fields["model"]
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    name = model.get("unk_token")
    return name if name in model["vocab"] else None
