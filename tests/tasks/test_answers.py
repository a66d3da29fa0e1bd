"""From a text to tokens, as in data_prep."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from hvdtrain.tasks.answers import open_tokenizer


def test_the_name_of_a_special_token_in_a_text_is_text(tmp_path: Path):
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate("[]SEPx")}, []))
    tokenizer.add_special_tokens([AddedToken("[SEP]", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("x[SEP]").ids == [5, 6]
    assert open_tokenizer(tmp_path / "tokenizer.json").encode("x[SEP]").ids == [5, 0, 2, 3, 4, 1]
