"""Which tokens go on with a word, as each kind of tokenizer file says it."""

import json
from pathlib import Path
from typing import Any

import pytest

from hvdtrain.data.words import continues_word
from hvdtrain.errors import DataError

BYTE_LEVEL = {"pre_tokenizer": {"type": "ByteLevel"}}
METASPACE = {"decoder": {"type": "Sequence", "decoders": [{"type": "Metaspace", "replacement": "▁"}]}}
LLAMA = {"normalizer": {"type": "Prepend", "prepend": "▁"}}


def tokenizer(path: Path, model: dict[str, Any], vocab: Any, special: tuple[int, ...] = (), **steps: Any) -> Path:
    added = [{"id": number, "content": f"<{number}>", "special": True} for number in special]
    fields = {"model": {**model, "vocab": vocab}, "added_tokens": added, **steps}
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


PIECES = {"type": "WordPiece", "continuing_subword_prefix": "##"}


@pytest.mark.parametrize(
    ("model", "vocab", "steps", "going_on"),
    [
        (PIECES, numbered("[CLS]", "un", "##able", "#", "##s", "漢", "##漢"), {}, {2, 4, 6}),
        ({"type": "BPE"}, numbered("<s>", "Ġun", "able", "Ċ", "Ġ", "!"), BYTE_LEVEL, {2, 5}),
        ({"type": "Unigram"}, [["<s>", 0], ["▁un", -1], ["able", -2], ["▁", -3]], METASPACE, {2}),
        ({"type": "BPE"}, numbered("<s>", "▁un", "able"), LLAMA, {2}),
        ({"type": "WordLevel"}, numbered("<s>", "un", "able"), {}, set()),
        ({"type": "BPE"}, numbered("<s>", "a", " ", "\n", "é"), {}, {1, 4}),
    ],
)
def test_what_goes_on_with_a_word(tmp_path: Path, model: dict, vocab: Any, steps: dict, going_on: set[int]):
    path = tokenizer(tmp_path / "t.json", model, vocab, (0,), **steps)
    found = continues_word(path, len(vocab) + 2)  # a vocabulary may be padded
    assert found.dtype == bool
    assert (len(found), {*found.nonzero()[0].tolist()}) == (len(vocab) + 2, going_on)


def test_a_special_token_never_goes_on(tmp_path: Path):
    path = tokenizer(tmp_path / "t.json", {"type": "BPE"}, numbered("a", "<mask>"), (1,), **BYTE_LEVEL)
    assert continues_word(path, 2).tolist() == [True, False]


def test_where_it_cannot_be_told(tmp_path: Path):
    path = tokenizer(tmp_path / "t.json", {"type": "BPE", "end_of_word_suffix": "</w>"}, numbered("a", "b</w>"))
    with pytest.raises(DataError, match=r"t\.json marks where words end, not where they begin"):
        continues_word(path, 2)
    with pytest.raises(DataError, match=r"cannot read .*none\.json"):
        continues_word(tmp_path / "none.json", 2)
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"bad\.json is not a tokenizer file"):
        continues_word(tmp_path / "bad.json", 2)
