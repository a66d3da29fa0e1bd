"""Adapters alone, as peft loads them on the model that they were trained on.

    OUT/adapter_config.json            rank, alpha, which of their modules have adapters
        adapter_model.safetensors      base_model.model.MODULE.lora_A.weight [R, D], .lora_B.weight [E, R]

Where theirs is one matrix for q, k and v (GPT-2), our adapters become one of them all together:

    A = [A_q; A_v]        B = [B_q  0 ]       rank and alpha grow alike, so that alpha / rank stays
                              [ 0   0 ]
                              [ 0  B_v]

Shape letters:  D what goes in, E what comes out, R rank
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from hvdtrain.files import write, write_json
from hvdtrain.models.hf.families import family_for
from hvdtrain.models.hf.layout import Layout, Part
from hvdtrain.models.hf.writing import Exported
from hvdtrain.models.lora import LoraOptions, is_adapter, parts_of
from hvdtrain.slices import Rect, Tensors

_TASKS = {"Decoder": "CAUSAL_LM", "Seq2Seq": "SEQ_2_SEQ_LM", "Classifier": "SEQ_CLS", "SpanModel": "QUESTION_ANS"}


class _Placed(NamedTuple):
    """An adapter of ours, called ``name``, on rows ``begin`` to ``end`` of a matrix of theirs."""

    name: str
    begin: int
    end: int


def write_adapter(
    folder: Path, exported: Exported, tensors: Tensors, trained: Sequence[str], lora: LoraOptions, base: str
) -> None:
    """Into ``folder``, which is there and empty. trained: names of all parameters that are, those of adapters among
    them. base: where the model lies that the adapters belong to.

    Errors: ConfigError where no family of theirs has this model; OutputError.
    """
    family, architecture = family_for(exported.options, exported.model, exported.bare)
    layout = Layout(family, architecture, exported.options, exported.vocab_size, len(exported.label_names))
    content: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for layer in dict.fromkeys(name.partition(".lora.")[0] for name in trained if is_adapter(name)):
        for part in layout.parts[f"{layer}.weight"]:
            if placed := list(_placed(layer, part, exported, trained)):
                module = part.theirs.removesuffix(".weight")
                a_RD, b_ER = _joined(placed, part, tensors, lora.rank)
                content[f"base_model.model.{module}.lora_A.weight"] = a_RD
                content[f"base_model.model.{module}.lora_B.weight"] = b_ER
                ranks[module] = lora.rank * len(placed)
                transposed |= part.turned == "transposed"
    beside: dict[str, None] = {}
    for name in (name for name in trained if not is_adapter(name)):
        for part in layout.parts[name]:
            rows = tensors.read(name, [Rect((part.begin, *(0 for _ in part.shape[1:])), part.shape)])
            content[f"base_model.model.{part.theirs}"] = part.to_theirs(rows).clone()
            beside[part.theirs.rpartition(".")[0]] = None
    write(folder / "adapter_model.safetensors", partial(save_file, content, metadata={"format": "pt"}))
    write_json(
        folder / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": _TASKS.get(exported.model),
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "bias": "none",
            "fan_in_fan_out": transposed,
            "target_modules": list(ranks),
            **_patterns(ranks, lora),
            "modules_to_save": list(beside) or None,
        },
    )


def _patterns(ranks: dict[str, int], lora: LoraOptions) -> dict[str, Any]:
    """Modules of another rank than ``lora``'s."""
    others = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return {"rank_pattern": others, "alpha_pattern": {module: rank * lora.scale for module, rank in others.items()}}


def _placed(layer: str, part: Part, exported: Exported, trained: Sequence[str]) -> Iterator[_Placed]:
    begin = 0
    for own, rows in parts_of(layer, exported.options).items():
        if f"{layer}.lora.{own}.a" in trained and part.begin <= begin < part.end:
            yield _Placed(f"{layer}.lora.{own}", begin - part.begin, begin - part.begin + rows)
        begin += rows


def _joined(placed: Sequence[_Placed], part: Part, tensors: Tensors, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    a_RD = torch.cat([tensors.read(f"{one.name}.a") for one in placed])
    b_ER = torch.zeros(part.shape[0], len(a_RD), dtype=a_RD.dtype)
    for number, one in enumerate(placed):
        b_ER[one.begin : one.end, number * rank : (number + 1) * rank] = tensors.read(f"{one.name}.b")
    return a_RD, b_ER
