"""Adapters that peft loads: on transformers' model of the same base they give our logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import Held
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.encoder import Classifier
from hvdtrain.models.frozen import freeze
from hvdtrain.models.hf.adapter import write_adapter
from hvdtrain.models.hf.writing import Exported, Writer
from hvdtrain.models.initial import fill
from hvdtrain.models.lora import LoraOptions, adapt, initial_adapters
from hvdtrain.models.options import TransformerOptions

# peft asks transformers for what its next major version calls otherwise
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
VOCABULARY = 23
SMALL: dict[str, Any] = {"layers": 2, "heads": 4, "width": 32, "context": 16, "ff_width": 48}
GPT2 = TransformerOptions(preset="gpt2", **SMALL)
LLAMA = TransformerOptions(preset="llama", kv_heads=2, **SMALL)
BERT = TransformerOptions(preset="bert", **SMALL)
TOKENS = torch.randint(0, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))


def written(tmp_path: Path, model: Any, options: TransformerOptions, lora: LoraOptions, labels: tuple[str, ...]) -> Any:
    """The base as a folder, then ``model`` with adapters that have learned, as another; peft's model of the two."""
    model.initialise(1)
    exported = Exported(type(model).__name__, options, VOCABULARY, {}, labels)
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    Writer(exported).write(tmp_path / "base", Held(model), torch.float32, None)
    adapt(model, options, lora)
    fill(model, initial_adapters(model, 1))
    freeze(model, "", lora, scores_tokens=not labels)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter += 0.2 * torch.randn(parameter.shape)
    write_adapter(tmp_path / "adapter", exported, Held(model), trained, lora, str(tmp_path / "base"))
    kind = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    base = kind.from_pretrained(tmp_path / "base", dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(base, tmp_path / "adapter").eval()


@pytest.mark.parametrize("options", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("targets", ["q,v", "all"])
def test_peft_gives_our_logits(tmp_path: Path, options: TransformerOptions, targets: str):
    model = Decoder(options, VOCABULARY).eval()
    theirs = written(tmp_path, model, options, LoraOptions(rank=3, alpha=5.0, targets=targets), ())
    with torch.no_grad():
        ours = model.logits(model(TOKENS))
        torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=0, atol=1e-5 * max(1.0, ours.abs().max().item()))


def test_what_is_trained_beside_adapters_is_saved_with_them(tmp_path: Path):
    model = Classifier(BERT, VOCABULARY, 3).eval()
    theirs = written(tmp_path, model, BERT, LoraOptions(targets="q,v"), ("a", "b", "c"))
    with torch.no_grad():
        ours = model(TOKENS, torch.full((3,), 9))
        found = theirs(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5 * max(1.0, ours.abs().max().item()))
