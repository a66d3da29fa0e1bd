"""Tokenizers in the layouts of well-known models, made small: their steps and flags, and the places, names and marks of
their special tokens. ``LAYOUTS``: name -> the fields of a ``tokenizer.json``.
"""

from typing import Any

from tokenizers import pre_tokenizers

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
CHARACTERS = [chr(number) for number in range(0x21, 0x7F)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# As Llama 3 has it; Qwen takes one digit at a time.
SPLIT = "|".join(
    [
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

Fields = dict[str, Any]


def bpe(tokens: list[str], merges: list[list[str]], **more: Any) -> Fields:
    vocab = {token: number for number, token in enumerate([*tokens, *("".join(pair) for pair in merges)])}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**model, "vocab": vocab, "merges": merges, **more}


def file(model: Fields, special: list[str], plain: list[str] = (), **steps: Any) -> Fields:
    """special, plain: added tokens that are marked special, and that are not; those the model lacks come after it."""
    vocab = model["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {row[0]: number for number, row in enumerate(vocab)}
    added = []
    for name in [*special, *plain]:
        ids.setdefault(name, len(ids))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": ids[name], "content": name, **flags, "special": name in special})
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    added.sort(key=lambda token: token["id"])
    return {"version": "1.0", **empty, "added_tokens": added, **steps, "model": model}


def template(ids: dict[str, int], before: list[str], after: list[str]) -> Fields:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    around = [[{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in (before, after)]
    special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in [*before, *after]}
    single = [*around[0], text, *around[1]]
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def sequence(kind: str, *steps: Fields) -> Fields:
    return {"type": "Sequence", kind: list(steps)}


def byte_level(**more: Any) -> Fields:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **more}


def replace(what: str, by: str) -> Fields:
    return {"type": "Replace", "pattern": {"String": what}, "content": by}


def split(pattern: Fields, behavior: str = "Isolated") -> Fields:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def by(*patterns: str) -> Fields:
    return sequence("pretokenizers", *(split({"Regex": one}) for one in patterns), byte_level(use_regex=False))


MERGES = [["Ġ", "t"], ["h", "e"], ["Ġt", "he"]]


def gpt2() -> Fields:
    """The end of text is the last token of the model's own vocabulary."""
    model = bpe(LETTERS, MERGES)
    model["vocab"]["<|endoftext|>"] = len(model["vocab"])
    steps = {"pre_tokenizer": byte_level(), "decoder": byte_level(), "post_processor": byte_level()}
    return file(model, ["<|endoftext|>"], **steps)


def llama2() -> Fields:
    """Characters with U+2581 for spaces, and tokens of bytes for all others."""
    merges = [["▁", "t"], ["h", "e"], ["▁t", "he"]]
    more = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    model = bpe(["<unk>", "<s>", "</s>", *BYTES, "▁", *CHARACTERS], merges, **more)
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return file(
        model,
        ["<unk>", "<s>", "</s>"],
        normalizer=sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")),
        post_processor=template(model["vocab"], ["<s>"], []),
        decoder=sequence("decoders", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, strip),
    )


def llama3() -> Fields:
    """Special tokens beyond the model's vocabulary, among them the end of a turn."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    made = file(bpe(LETTERS, MERGES, ignore_merges=True), names, pre_tokenizer=by(SPLIT), decoder=byte_level())
    ids = {token["content"]: token["id"] for token in made["added_tokens"]}
    begin = template(ids, ["<|begin_of_text|>"], [])
    return {**made, "post_processor": sequence("processors", byte_level(trim_offsets=False), begin)}


def qwen3() -> Fields:
    """Text is composed (NFC); marks of thinking are added but not special; nothing begins a text."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    steps = {"pre_tokenizer": by(SPLIT.replace("{1,3}", "")), "decoder": byte_level(), "post_processor": byte_level()}
    return file(bpe(LETTERS, MERGES), names, ["<think>", "</think>"], normalizer={"type": "NFC"}, **steps)


def gemma3() -> Fields:
    """HTML's tags, </s> among them, and runs of line ends are tokens of text."""
    plain = ["<mask>", "[multimodal]", "<unused0>", "\n\n", "<table>", "<s>", "</s>", "<strong>"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    names = [*special[:4], plain[0], plain[1], plain[2], *special[4:], *plain[3:]]
    more = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    model = bpe([*names, *BYTES, "▁", *CHARACTERS], [["▁", "t"], ["h", "e"], ["▁t", "he"]], **more)
    return file(
        model,
        special,
        plain,
        normalizer=replace(" ", "▁"),
        pre_tokenizer=split({"String": " "}, "MergedWithPrevious"),
        post_processor=template(model["vocab"], ["<bos>"], []),
        decoder=sequence("decoders", replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}),
    )


def deepseek() -> Fields:
    """Special tokens with wide bars, the first of the vocabulary; those of a chat are not special."""
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    made = file(
        bpe([*names, *LETTERS], MERGES),
        names,
        ["<｜User｜>", "<｜Assistant｜>"],
        normalizer=sequence("normalizers"),
        pre_tokenizer=by(r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", SPLIT),
        decoder=byte_level(),
    )
    ids = {token["content"]: token["id"] for token in made["added_tokens"]}
    return {**made, "post_processor": sequence("processors", byte_level(), template(ids, names[:1], []))}


def bert() -> Fields:
    """WordPiece of lower case letters; a separator ends a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [character for character in CHARACTERS if not character.isupper()]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters), "the", "é", "##é", "漢"]
    vocab = {token: number for number, token in enumerate(tokens)}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocab}
    flags = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    return file(
        {**model, "max_input_chars_per_word": 100},
        special,
        normalizer={"type": "BertNormalizer", **flags},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=template(vocab, ["[CLS]"], ["[SEP]"]),
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )


def t5() -> Fields:
    """Pieces with their probabilities; the special ones are the likeliest of all. Some tokens of text are missing."""
    special = ["<pad>", "</s>", "<unk>"]
    vocab = [[name, 0.0] for name in special] + [["▁", -2.0], ["▁the", -3.0], ["e", -3.5]]
    vocab += [[character, -5.0] for character in [*CHARACTERS, "é", "漢"] if character != "e"]
    vocab += [[f"<extra_id_{number}>", 0.0] for number in (1, 0)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    ids = {name: number for number, (name, _) in enumerate(vocab)}
    return file(
        {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
        [*special, "<extra_id_0>", "<extra_id_1>"],
        normalizer=sequence("normalizers", {"type": "Nmt"}, {"type": "NFKC"}),
        pre_tokenizer=sequence("pretokenizers", {"type": "WhitespaceSplit"}, metaspace),
        post_processor=template(ids, [], ["</s>"]),
        decoder=metaspace,
    )


LAYOUTS = {make.__name__: make() for make in (gpt2, llama2, llama3, qwen3, gemma3, deepseek, bert, t5)}
