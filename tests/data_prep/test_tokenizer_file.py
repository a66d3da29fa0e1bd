"""Tokenizers of others, from a file to shards: the same text always becomes the same tokens, text stays text, and what
a vocabulary lacks is refused or counted.
"""

import json
from pathlib import Path

import pytest
from layouts import CHARACTERS, LAYOUTS, LETTERS, MERGES, Fields, bpe, byte_level, file, llama2
from preparing import files_of, run, snapshot, text_kind, token_rows, write
from tokenizers import Tokenizer

from data_prep.__main__ import main
from data_prep.tokenizer_file import load_tokenizer
from data_prep.vocabulary import vocabulary_report
from hvdtrain.data.shards import Manifest, read_manifest
from hvdtrain.errors import EXIT_BAD_DATA, EXIT_OK, EXIT_USAGE, ConfigError, DataError, HvdtrainError

NAMES = "</s> <s> <eos> <|endoftext|> <|end_of_text|> <|im_end|> <|eot_id|> [SEP] <extra_id_0> <end_of_turn>"
TEXTS = ["the cat, 1984! It's 'the'.", f"HTML's </s>, a</s>, <s>the</s>. {NAMES}", "é 漢 é", "x"]
# All bytes: emoji families, U+2028, a control character, white space, a mark before it is composed, U+2581.
MORE_TEXTS = ["\U0001f468\u200d\U0001f469 \u2028\x07\t \r\n\n", "漢字とかな e\u0301 ﬁ", "▁ and <0x0A>", "  a  b "]
LOSSLESS = ("gpt2", "llama2", "llama3", "qwen3", "gemma3", "deepseek")


def saved(folder: Path, fields: Fields, name: str = "t.json") -> Path:
    write(folder, **{name: json.dumps(fields, ensure_ascii=False)})
    return folder / name


def lines(folder: Path, *texts: str) -> Path:
    """A file of one document each; \\n stays in its document."""
    write(folder, **{"in.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts)})
    return folder / "in.jsonl"


def prepare(folder: Path, tokenizer: Path, *texts: str) -> Manifest:
    end = load_tokenizer(tokenizer).special["eos"]
    files = files_of(lines(folder, *texts))

    def kind():
        made = text_kind(files)
        made.end_of_text = end
        return made

    return run(kind, tokenizer, folder / "out")[0]


def back(folder: Path) -> list[str]:
    """The documents, by the tokenizer beside the shards; an end stands at their ends and nowhere else."""
    tokenizer = Tokenizer.from_file(str(folder / "out" / "tokenizer.json"))
    end = read_manifest(folder / "out").special_tokens["eos"]
    rows = token_rows(folder / "out", "train")
    assert all(row.count(end) == 1 and row[-1] == end for row in rows)
    return [tokenizer.decode(row[:-1], skip_special_tokens=False) for row in rows]


def unique_tokens(tokenizer: Tokenizer, text: str) -> set[tuple[int, ...]]:
    return {tuple(tokenizer.encode(text, add_special_tokens=False).ids) for _ in range(20)}


# --- layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LOSSLESS)
def test_nothing_is_lost_by_a_layout_with_bytes(tmp_path: Path, layout: str):
    texts = [*TEXTS, *MORE_TEXTS]
    tokenizer = saved(tmp_path, LAYOUTS[layout])
    manifest = prepare(tmp_path, tokenizer, *texts)
    expected = [text.replace("▁", " ") if layout in ("llama2", "gemma3") else text for text in texts]
    assert back(tmp_path) == [text.replace("e\u0301", "é") if layout == "qwen3" else text for text in expected]
    assert not manifest.source.keys() & {"unknown_tokens", "dropped_characters"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_an_html_tag_is_no_end_of_a_document(tmp_path: Path):
    """Gemma 3 has tokens for HTML's tags; by its name one of them was taken for the end."""
    fields = LAYOUTS["gemma3"]
    tag, end = fields["model"]["vocab"]["</s>"], fields["model"]["vocab"]["<eos>"]
    assert prepare(tmp_path, saved(tmp_path, fields), "a</s>b <eos>").special_tokens["eos"] == end
    ((*row, last),) = token_rows(tmp_path / "out", "train")
    assert (tag in row, end in row, last) == (True, False, end)


def test_t5_finds_its_special_tokens_in_no_text(tmp_path: Path):
    """They are its likeliest pieces: written in a text, each was the shortest way to say itself."""
    manifest = prepare(tmp_path, saved(tmp_path, LAYOUTS["t5"]), *TEXTS)
    assert back(tmp_path) == TEXTS
    assert manifest.source["tokenizer_notes"] == [
        "<pad>, </s>, <extra_id_1>, ... in a text is kept apart from the special token of that name"
    ]
    names = {token["id"] for token in LAYOUTS["t5"]["added_tokens"]}
    assert not names & {token for row in token_rows(tmp_path / "out", "train") for token in row[:-1]}


def test_bert_counts_what_it_does_not_know(tmp_path: Path):
    manifest = prepare(tmp_path, saved(tmp_path, LAYOUTS["bert"]), "The the [SEP] 漢 字 ☃x")
    assert back(tmp_path) == ["the the [ sep ] 漢 [UNK] [UNK]"]
    assert manifest.source["unknown_tokens"] == 2


# --- the same tokens every time ----------------------------------------------------------------------------------


def test_dropout_is_switched_off_aloud(tmp_path: Path, capsys: pytest.CaptureFixture):
    fields = LAYOUTS["gpt2"] | {"model": {**LAYOUTS["gpt2"]["model"], "dropout": 0.5}}
    path = saved(tmp_path, fields)
    assert len(unique_tokens(Tokenizer.from_file(str(path)), "the the")) > 1
    note = "its dropout of 0.5 is switched off, with which a text would have other tokens each time"
    manifest = prepare(tmp_path, path, "the the")
    assert manifest.source["tokenizer_notes"] == [note]
    assert f"note: tokenizer {path}: {note}" in capsys.readouterr().err
    ((*row, _),) = token_rows(tmp_path / "out", "train")
    assert unique_tokens(Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), "the the") == {(*row,)}
    assert len({vocabulary_report(Tokenizer.from_file(str(path)), ["the the"]) for _ in range(20)}) == 1
    before = snapshot(tmp_path / "out")
    assert run(lambda: text_kind(files_of(tmp_path / "in.jsonl")), path, tmp_path / "out")[1]  # kept, not made anew
    assert snapshot(tmp_path / "out") == before


def test_no_text_is_cut_short(tmp_path: Path):
    """Files for sentence embeddings say to cut each text after 128 tokens and to fill it up."""
    path = saved(tmp_path, LAYOUTS["bert"])
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    assert len(loaded.tokenizer().encode("the " * 5, add_special_tokens=False).ids) == 5
    assert loaded.notes == ("its truncation of texts is switched off", "its padding of texts is switched off")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_changed_needs_no_change_again(tmp_path: Path, layout: str):
    fields = LAYOUTS[layout] | {"truncation": None}
    fields["model"] = {**fields["model"], **({"dropout": 0.1} if "dropout" in fields["model"] else {})}
    first = load_tokenizer(saved(tmp_path, fields))
    (tmp_path / "again.json").write_bytes(first.content)
    again = load_tokenizer(tmp_path / "again.json")
    assert (again.content, again.special) == (first.content, first.special)
    assert not any("dropout" in note or "kept apart" in note for note in again.notes)


def test_a_file_in_out_is_not_written_over(tmp_path: Path):
    fields = LAYOUTS["gpt2"] | {"model": {**LAYOUTS["gpt2"]["model"], "dropout": 0.5}}
    path = saved(tmp_path / "out", fields, "tokenizer.json")
    before = path.read_bytes()
    with pytest.raises(
        HvdtrainError, match=r"tokenizer\.json must be changed for use \(its dropout .*; move it out of"
    ):
        prepare(tmp_path, path, "the")
    assert path.read_bytes() == before


# --- a token with a role -----------------------------------------------------------------------------------------


def test_a_token_that_gets_a_role_is_no_text_any_more(tmp_path: Path, capsys: pytest.CaptureFixture):
    """``<strong>`` in a text was that token, and would be the end of a document in its middle."""
    path, out = saved(tmp_path, LAYOUTS["gemma3"]), tmp_path / "out"
    words = ["text", "--input", lines(tmp_path, "a<strong>b", "c"), "--tokenizer", path, "--out", out]
    assert main([*map(str, words), "--val-fraction", "0", "--eos", "<strong>"]) == EXIT_OK
    assert back(tmp_path) == ["a<strong>b", "c"]
    assert read_manifest(out).special_tokens["eos"] == LAYOUTS["gemma3"]["model"]["vocab"]["<strong>"]
    assert "<strong> is marked special, so that in a text it is text" in capsys.readouterr().err


def test_a_word_as_the_end_is_kept_apart(tmp_path: Path):
    """A WordLevel model finds it by itself, marked or not; a word of one character cannot be cut."""
    model = {"type": "WordLevel", "vocab": {"[UNK]": 0, "fin": 1, ".": 2, "a": 3}, "unk_token": "[UNK]"}
    path = saved(tmp_path, file(model, ["[UNK]"], pre_tokenizer={"type": "WhitespaceSplit"}))
    assert load_tokenizer(path, {"eos": "fin"}).tokenizer().encode("a fin a").ids == [3, 0, 0, 3]
    with pytest.raises(DataError, match=r"the text '\.' would become the special token of that name"):
        load_tokenizer(path, {"eos": "."})


def test_a_piece_of_text_as_the_end_is_kept_apart(tmp_path: Path):
    """In a byte-level vocabulary a piece is not written as the text that it stands for."""
    path = saved(tmp_path, LAYOUTS["gpt2"])
    loaded = load_tokenizer(path, {"eos": "Ġthe"})
    ids = loaded.tokenizer().encode("x the there").ids
    assert loaded.special["eos"] not in ids
    assert loaded.tokenizer().decode(ids) == "x the there"
    with pytest.raises(DataError, match="the text 'Ċ' would become the special token of that name"):
        load_tokenizer(path, {"eos": "Ċ"})


def test_shards_with_another_end_are_others(tmp_path: Path, capsys: pytest.CaptureFixture):
    path, out = saved(tmp_path, LAYOUTS["llama3"]), tmp_path / "out"
    words = ["text", "--input", lines(tmp_path, "a", "b"), "--tokenizer", path, "--out", out, "--val-fraction", 0]
    turn = ["--eos", "<|eot_id|>"]
    assert main([*map(str, words), *turn]) == EXIT_OK
    assert main([*map(str, words), *turn]) == EXIT_OK  # kept
    assert main([*map(str, words)]) == EXIT_USAGE
    assert "made otherwise (differing: special_tokens)" in capsys.readouterr().err
    # The tokenizer of a folder of shards goes on as it was used there.
    words[4], words[6] = out / "tokenizer.json", tmp_path / "more"
    assert main([*map(str, words)]) == EXIT_OK
    assert read_manifest(tmp_path / "more").special_tokens == read_manifest(out).special_tokens


@pytest.mark.parametrize("command", ["text", "pairs", "labels"])
def test_every_command_takes_the_roles(tmp_path: Path, command: str):
    rows = "".join(f'{{"text": "a", "label": "x", "source": "a", "target": "b{n}"}}\n' for n in range(3))
    write(tmp_path, **{"in.jsonl": rows})
    words = ["--input", tmp_path / "in.jsonl", "--tokenizer", saved(tmp_path, LAYOUTS["gemma3"]), "--val-fraction", 0]
    chosen = {"eos": "<end_of_turn>", "bos": "<start_of_turn>", "pad": "<table>"}
    words += [word for role, name in chosen.items() for word in (f"--{role}", name)]
    assert main([command, *map(str, words), "--out", str(tmp_path / "out")]) == EXIT_OK
    special = read_manifest(tmp_path / "out").special_tokens
    vocab = LAYOUTS["gemma3"]["model"]["vocab"]
    assert special == {"unk": vocab["<unk>"], **{role: vocab[name] for role, name in chosen.items()}}


def test_help_tells_which_token_is_taken(capsys: pytest.CaptureFixture):
    for command in ("text", "pairs", "labels"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        prose = " ".join(capsys.readouterr().out.split())
        assert "--eos NAME ends a document --pad NAME" in prose
        assert "known names of tokens marked special" in prose


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--eos", "<|im_ends|>"], EXIT_USAGE, "has no such token; close to it: <|im_end|>"),
        ([], EXIT_BAD_DATA, "t.json has no token that is known to end a document; name one with --eos NAME: it has: "),
    ],
)
def test_the_cure_is_in_the_message(tmp_path: Path, capsys: pytest.CaptureFixture, words, code: int, message: str):
    fields = LAYOUTS["qwen3"] if words else file(bpe(LETTERS, MERGES), ["<x>"], pre_tokenizer=byte_level())
    how = ["--input", lines(tmp_path, "a"), "--tokenizer", saved(tmp_path, fields), "--out", tmp_path / "out", *words]
    assert main(["text", *map(str, how)]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what a vocabulary lacks -------------------------------------------------------------------------------------

WORDS = {"the": 0, "cat": 1, "</s>": 2, "what": 3}
WITHOUT_UNKNOWN = {
    "WordLevel": {"vocab": WORDS, "unk_token": "[UNK]"},  # a name that the vocabulary lacks
    "WordPiece": {
        "vocab": WORDS, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
    },
    "Unigram": {"vocab": [[piece, -1.0] for piece in [*WORDS, *"thecaw"]], "unk_id": None, "byte_fallback": False},
    "BPE": {**bpe([*"thecaw", "</s>", "what"], []), "unk_token": "[UNK]"},
}  # fmt: skip


def without_unknown(kind: str) -> Fields:
    steps = {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    return file({"type": kind, **WITHOUT_UNKNOWN[kind]}, ["</s>"], **steps)


@pytest.mark.parametrize("kind", WITHOUT_UNKNOWN)
def test_a_word_without_a_token_is_named_with_its_file(tmp_path: Path, capsys: pytest.CaptureFixture, kind: str):
    write(tmp_path / "in", **{"a.txt": "the cat", "b.txt": "the wörd cat", "c.txt": "the cat the"})
    how = ["--input", tmp_path / "in", "--tokenizer", saved(tmp_path, without_unknown(kind)), "--val-fraction", "0"]
    assert main(["text", *map(str, how), "--out", str(tmp_path / "out")]) == EXIT_BAD_DATA
    error = capsys.readouterr().err
    assert "b.txt: the word 'wörd' has no token, and the tokenizer has none for unknown words" in error
    assert "--unk NAME" in error
    assert "Traceback" not in error
    # The cure.
    assert main(["text", *map(str, how), "--out", str(tmp_path / "out"), "--unk", "what"]) == EXIT_OK
    manifest = read_manifest(tmp_path / "out")
    assert manifest.source["unknown_tokens"] >= 1
    assert "what stands for what its vocabulary lacks" in manifest.source["tokenizer_notes"]
    assert f"{manifest.source['unknown_tokens']} tokens that stand for something unknown" in capsys.readouterr().out


def test_of_pairs_the_side_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    write(tmp_path, **{"a.src": "the\ncat\n", "a.trg": "cat\nthe wörd\n"})
    tokenizer = saved(tmp_path, without_unknown("WordLevel"))
    how = ["--source", tmp_path / "a.src", "--target", tmp_path / "a.trg", "--tokenizer", tokenizer]
    assert main(["pairs", *map(str, how), "--out", str(tmp_path / "out")]) == EXIT_BAD_DATA
    assert "a.trg: the word 'wörd'" in capsys.readouterr().err


def test_only_a_token_of_the_model_stands_for_the_unknown(tmp_path: Path):
    fields = without_unknown("WordLevel")
    fields["added_tokens"].append({**fields["added_tokens"][0], "id": 9, "content": "<unk>"})
    with pytest.raises(ConfigError, match="--unk <unk>: only a token of the model's own vocabulary can"):
        load_tokenizer(saved(tmp_path, fields), {"unk": "<unk>"})


def test_characters_that_a_model_drops_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Byte-pair encoding without an unknown token and without bytes leaves out what it does not know."""
    path = saved(tmp_path, file(bpe([*CHARACTERS, " "], [["t", "h"]]), ["</s>"]))
    how = ["--input", lines(tmp_path, "the", "t漢h 漢☃!", "\n"), "--tokenizer", path, "--val-fraction", "0"]
    assert main(["text", *map(str, how), "--out", str(tmp_path / "out")]) == EXIT_OK
    assert read_manifest(tmp_path / "out").source["dropped_characters"] == 4
    printed = capsys.readouterr()
    assert "4 characters that the tokenizer dropped, for it has no token for them" in printed.out
    assert "it has no token for what it does not know" in printed.err  # why the fast library does not do it
    assert [len(row) for row in token_rows(tmp_path / "out", "train")] == [3, 4, 1]  # "th" grew together over the gap


def test_llama2_without_some_bytes_drops_nothing_in_silence(tmp_path: Path):
    fields = llama2()
    vocab = {name: number for name, number in fields["model"]["vocab"].items() if name != "<0xE6>"}
    fields["model"] = {**fields["model"], "vocab": vocab, "unk_token": None}
    assert load_tokenizer(saved(tmp_path, fields)).unknown == "dropped"
    assert prepare(tmp_path, tmp_path / "t.json", "the 漢 é").source["dropped_characters"] >= 1


def test_files_that_are_no_tokenizer(tmp_path: Path):
    path = tmp_path / "t.json"
    with pytest.raises(DataError, match=r"cannot read tokenizer .*t\.json: No such file"):
        load_tokenizer(path)
    for content in (b"{}", b"\xff", b"", b"[]", b'{"model": {}}'):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"t\.json is not a tokenizer file"):
            load_tokenizer(path)


def test_questions_go_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture):
    """They are encoded by another call of the library, which tells where each token stands."""
    asked = {"id": "1", "question": "what cat", "answers": [{"text": "cat", "answer_start": 4}]}
    data = [{"title": "", "paragraphs": [{"context": "the cat wörd", "qas": [asked]}]}]
    write(tmp_path, **{"a.json": json.dumps({"data": data})})
    tokenizer = saved(tmp_path, without_unknown("WordLevel"))
    how = ["--input", tmp_path / "a.json", "--tokenizer", tokenizer, "--out", tmp_path / "out", "--val-fraction", "0"]
    assert main(["labels", *map(str, how)]) == EXIT_BAD_DATA
    assert "a.json: the word 'wörd' has no token" in capsys.readouterr().err
    assert main(["labels", *map(str, how), "--unk", "what"]) == EXIT_OK
    # "what" is in the question too; a token of that id is unknown, in whatever text it stands.
    assert read_manifest(tmp_path / "out").source["unknown_tokens"] == 2
