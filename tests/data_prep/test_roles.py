"""Which token ends a document: in files of others, where names are not what they seem. A wrong one is silent."""

import json
from pathlib import Path
from typing import Any

import pytest
from layouts import CHARACTERS, LAYOUTS, Fields, bpe, file, template
from preparing import write

from data_prep.roles import SPECIAL_TOKENS, TURN_ENDS, claims_beside, find_roles
from data_prep.tokenizer_file import load_tokenizer
from hvdtrain.errors import ConfigError, DataError


def with_tokens(*special: str, plain: tuple[str, ...] = (), **steps: Any) -> Fields:
    """A tokenizer of characters with these added tokens."""
    return file(bpe(CHARACTERS, []), list(special), list(plain), **steps)


def roles(fields: Fields, **how: Any) -> dict[str, str]:
    return find_roles(fields, **how)[0]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("gpt2", {"eos": "<|endoftext|>"}),
        ("llama2", {"eos": "</s>", "bos": "<s>", "unk": "<unk>"}),
        ("llama3", {"eos": "<|end_of_text|>", "bos": "<|begin_of_text|>", "pad": "<|finetune_right_pad_id|>"}),
        ("qwen3", {"eos": "<|endoftext|>"}),
        ("gemma3", {"eos": "<eos>", "bos": "<bos>", "pad": "<pad>", "unk": "<unk>"}),  # <mask>, <s>, </s> are text
        ("deepseek", {"eos": "<｜end▁of▁sentence｜>", "bos": "<｜begin▁of▁sentence｜>", "pad": "<｜▁pad▁｜>"}),
        ("bert", {"eos": "[SEP]", "sep": "[SEP]", "cls": "[CLS]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}),
        ("t5", {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}),
    ],
)
def test_the_roles_of_well_known_layouts(tmp_path: Path, layout: str, expected: dict[str, str]):
    fields = LAYOUTS[layout]
    assert roles(fields) == expected
    write(tmp_path, **{"t.json": json.dumps(fields)})
    tokenizer = load_tokenizer(tmp_path / "t.json")
    names = {role: tokenizer.tokenizer().id_to_token(number) for role, number in tokenizer.special.items()}
    assert names == expected


# --- ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [*SPECIAL_TOKENS["eos"], *TURN_ENDS, *SPECIAL_TOKENS["sep"]])
def test_every_known_end_is_found_if_it_is_special(end: str):
    assert roles(with_tokens("x-special", end))["eos"] == end
    with pytest.raises(DataError, match=r"it has no token that is known to end a document; name one with --eos NAME"):
        find_roles(with_tokens("x-special", plain=(end,)))


@pytest.mark.parametrize("turn", TURN_ENDS)
def test_a_document_ends_where_a_turn_does_not(turn: str):
    found, notes = find_roles(with_tokens(turn, "<|end_of_text|>"))
    assert found["eos"] == "<|end_of_text|>"
    assert notes == [f"documents end with <|end_of_text|>, not with {turn}; another: --eos NAME"]
    assert find_roles(with_tokens(turn))[1] == [
        f"documents end with {turn}, which is known as the end of a turn; another: --eos NAME"
    ]


@pytest.mark.parametrize("ends", [("</s>", "<|endoftext|>"), ("<|im_end|>", "<|eot_id|>")])
def test_of_two_equals_none_is_guessed(ends: tuple[str, str]):
    for names in (ends, ends[::-1]):
        with pytest.raises(
            ConfigError, match=r"it has several tokens that may be its eos: .*; give --eos NAME"
        ) as said:
            find_roles(with_tokens(*names))
        assert all(name in str(said.value) for name in ends)
    assert roles(with_tokens(*ends), asked={"eos": ends[1]})["eos"] == ends[1]


def test_two_tokens_of_any_role_are_not_guessed_either():
    with pytest.raises(ConfigError, match=r"several tokens that may be its bos: <\|bos\|>, <s>; give --bos NAME"):
        find_roles(with_tokens("</s>", "<s>", "<|bos|>"))


@pytest.mark.parametrize("name", ["x", "</s>", "<|eot_id|>", "<strong>"])
def test_the_user_decides(name: str):
    fields = with_tokens("<|endoftext|>", "<|eot_id|>", plain=("</s>", "<strong>"))
    assert find_roles(fields, {"eos": name}) == ({"eos": name}, [])


def test_a_name_that_is_not_there_gets_the_close_ones():
    fields = with_tokens("<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>")
    with pytest.raises(ConfigError, match=r"--eos <\|endoftext\|>: it has no such token; close to it: <\|end_of_te"):
        find_roles(fields, {"eos": "<|endoftext|>"})
    with pytest.raises(ConfigError, match=r"--bos 漢: it has no such token; it has: <\|end_of_text\|>, <\|begin_of_te"):
        find_roles(fields, {"bos": "漢"})


def test_without_an_end_the_special_tokens_are_offered():
    names = [f"<extra_{number}>" for number in range(30)]
    with pytest.raises(DataError, match=r"--eos NAME: it has: <extra_0>, <extra_1>, .*, <extra_19>, \.\.\.$"):
        find_roles(with_tokens(*names))
    with pytest.raises(DataError, match=r'--eos NAME: it has: !, ", #'):  # none is marked
        find_roles(with_tokens())


# --- the tokenizer itself ----------------------------------------------------------------------------------------


def test_what_a_post_processor_puts_around_a_text():
    ids = {"<BEGIN>": 94, "<END>": 95, "fr": 96, "</s>": 97, "<s>": 98}

    def made(before: list[str], after: list[str], *special: str) -> dict[str, str]:
        fields = with_tokens("<BEGIN>", "<END>", "fr", "</s>", "<s>")
        for token in fields["added_tokens"]:
            token["special"] = token["content"] in special
        return roles({**fields, "post_processor": template(ids, before, after)})

    assert made(["<BEGIN>"], ["<END>"]) == {"bos": "<BEGIN>", "eos": "<END>"}  # of any name, special or not
    assert made([], ["</s>", "fr"], "</s>", "fr") == {"eos": "</s>"}  # mBART's languages
    assert made(["fr"], ["</s>"], "</s>", "<s>", "fr") == {"eos": "</s>", "bos": "<s>"}  # NLLB's


def test_roberta_has_its_own_post_processor():
    fields = with_tokens("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    fields["post_processor"] = {"type": "RobertaProcessing", "sep": ["</s>", 96], "cls": ["<s>", 94]}
    expected = {"eos": "</s>", "bos": "<s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    assert roles(fields) == expected


def test_the_unknown_token_is_the_models_own():
    model = {"type": "WordLevel", "vocab": {"dunno": 0, "[UNK]": 1, "[SEP]": 2}, "unk_token": "dunno"}
    assert roles(file(model, ["[UNK]", "[SEP]"])) == {"eos": "[SEP]", "sep": "[SEP]", "unk": "dunno"}


# --- the folder --------------------------------------------------------------------------------------------------


def beside(folder: Path, fields: Fields, name: str = "tokenizer.json", **files: Any) -> Path:
    """A tokenizer with other files of its folder: ``tokenizer_config={...}``."""
    write(folder, **{name: json.dumps(fields), **{f"{key}.json": json.dumps(value) for key, value in files.items()}})
    return folder / name


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|fin|>"}},
        {"tokenizer_config": {"eos_token": {"content": "<|fin|>", "lstrip": False}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<|fin|>"}},
        {"generation_config": {"eos_token_id": 95}},
    ],
)
def test_the_folder_names_the_end(tmp_path: Path, files: dict[str, Any]):
    fields = with_tokens("</s>", "<|fin|>")
    path = beside(tmp_path, fields, **files)
    tokenizer = load_tokenizer(path)
    assert tokenizer.special == {"eos": 95}
    assert tokenizer.notes == ("documents end with <|fin|>, not with </s>; another: --eos NAME",)
    assert load_tokenizer(path, {"eos": "</s>"}).special == {"eos": 94}
    path.rename(tmp_path / "other.json")  # files of one tokenizer say nothing of another
    assert load_tokenizer(tmp_path / "other.json").special == {"eos": 94}


def test_shards_go_on_as_they_began(tmp_path: Path):
    """Whatever was chosen for them, if only the end of a turn."""
    fields = with_tokens("</s>", "<|im_end|>", "<unk>")
    said = {"special_tokens": {"eos": 95, "unk": 96, "pad": 999}}
    path = beside(tmp_path, fields, manifest=said, tokenizer_config={"eos_token": "</s>"})
    tokenizer = load_tokenizer(path)
    assert (tokenizer.special, tokenizer.content) == ({"eos": 95, "unk": 96}, path.read_bytes())
    assert tokenizer.notes == ("documents end with <|im_end|>, as those of the shards beside it; another: --eos NAME",)
    assert load_tokenizer(path, {"eos": "</s>"}).special["eos"] == 94


def test_the_end_of_a_turn_that_a_chat_folder_names_ends_no_document(tmp_path: Path):
    """Qwen3's tokenizer_config.json and generation_config.json name what ends a turn."""
    files = {"tokenizer_config": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}}
    path = beside(tmp_path, LAYOUTS["qwen3"], **files, generation_config={"eos_token_id": [261, 259]})
    tokenizer = load_tokenizer(path)
    assert tokenizer.special == {"eos": 259, "pad": 259}
    assert tokenizer.notes == ("documents end with <|endoftext|>, not with <|im_end|>; another: --eos NAME",)
    assert load_tokenizer(path, {"eos": "<|im_end|>"}).special["eos"] == 261


def test_gpt2s_folder_names_one_token_for_all(tmp_path: Path):
    """Its model knows every byte: nothing becomes its ``unk_token``."""
    names = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "unk")}
    path = beside(tmp_path, LAYOUTS["gpt2"], tokenizer_config=names)
    assert load_tokenizer(path).special == {"eos": 259, "bos": 259}


def test_an_end_that_the_tokenizer_lacks_is_refused(tmp_path: Path):
    path = beside(tmp_path, with_tokens("</s>"), tokenizer_config={"eos_token": "<eos>", "pad_token": "<pad>"})
    with pytest.raises(DataError, match=r"tokenizer_config\.json names <eos> as eos, which .*tokenizer\.json has not"):
        load_tokenizer(path)
    assert load_tokenizer(path, {"eos": "</s>"}).special == {"eos": 94}  # the way out that was told
    write(tmp_path, **{"tokenizer_config.json": json.dumps({"pad_token": "<pad>"})})  # added when it is used
    tokenizer = load_tokenizer(path)
    assert (tokenizer.special, len(tokenizer.notes)) == ({"eos": 94}, 1)
    assert "names <pad> as pad" in tokenizer.notes[0]


@pytest.mark.parametrize("content", ["{}", '{"eos_token": 7}', '{"eos_token_id": true, "special_tokens": 3}'])
def test_a_file_of_the_folder_that_says_nothing(tmp_path: Path, content: str):
    path = beside(tmp_path, with_tokens("</s>"))
    write(tmp_path, **{"tokenizer_config.json": content})
    assert not any(names for _, names in claims_beside(path, with_tokens("</s>")))
    assert load_tokenizer(path).special == {"eos": 94}


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_file_of_the_folder_is_not_passed_over(tmp_path: Path, content: str):
    path = beside(tmp_path, with_tokens("</s>"))
    write(tmp_path, **{"tokenizer_config.json": content})
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(path)
