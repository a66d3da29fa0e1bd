"""A model of ours as a Hugging Face folder.

    DIR/config.json, generation_config.json
        model.safetensors                     or, where it is larger than a file shall be:
        model-00001-of-00002.safetensors ...  and model.safetensors.index.json
        tokenizer.json, tokenizer_config.json, special_tokens_map.json

A file at a time is in memory.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hvdtrain.errors import ConfigError
from hvdtrain.files import write, write_json
from hvdtrain.models.hf.families import family_for
from hvdtrain.models.hf.folder import CONFIG, INDEX, ONE_FILE, ROLES, TOKENIZER
from hvdtrain.models.hf.layout import Layout, Part
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.positions import sinusoids
from hvdtrain.slices import Rect, Tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


@dataclass(frozen=True)
class Exported:
    """What is written. model: its class. special_tokens: role -> id. several_labels: may a text have several, or none?
    target_begin: the token that begins each target of a ``Seq2Seq``.

    bare: without its head; a classifier is a plain encoder with its pooler then.
    """

    model: str
    options: TransformerOptions
    vocab_size: int
    special_tokens: Mapping[str, int]
    label_names: Sequence[str] = ()
    several_labels: bool = False
    target_begin: int | None = None
    bare: bool = False


class Writer:
    """Knows at once whether a family of theirs has this model, and then writes it.

    Errors: ConfigError that names every option that does not fit.
    """

    def __init__(self, exported: Exported):
        self._exported, o = exported, exported.options
        self._family, self._architecture = family_for(o, exported.model, exported.bare)
        labels = len(exported.label_names)
        self._layout = Layout(self._family, self._architecture, o, exported.vocab_size, labels)

    @property
    def architecture(self) -> str:
        """The class in transformers."""
        return self._architecture.theirs

    def write(
        self,
        folder: Path,
        tensors: Tensors,
        dtype: torch.dtype,
        tokenizer: Path | None,
        file_bytes: int = 5_000_000_000,
    ) -> None:
        """Into ``folder``, which is there and empty; files of tensors have at most ``file_bytes``, or one tensor.

        Errors: OutputError; ConfigError where ``dtype`` does not hold a number.
        """
        self._write_tensors(folder, tensors, dtype, file_bytes)
        if tokenizer is not None:
            self._write_tokenizer(folder, tokenizer)
        write_json(folder / "generation_config.json", self._generation())
        write_json(folder / CONFIG, self._config(dtype))

    # --- tensors ---------------------------------------------------------------------------------------------------

    def _write_tensors(self, folder: Path, tensors: Tensors, dtype: torch.dtype, file_bytes: int) -> None:
        files = _shared_out(self._stored(tensors, dtype), dtype.itemsize, file_bytes)
        count = len(files)
        names = [ONE_FILE if count == 1 else f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
        for name, parts in zip(names, files, strict=True):
            content = {theirs: make() for theirs, _, make in parts}
            write(folder / name, partial(save_file, content, metadata={"format": "pt"}))
        if len(files) > 1:
            placed = {theirs: name for name, parts in zip(names, files, strict=True) for theirs, _, _ in parts}
            total = sum(numel for parts in files for _, numel, _ in parts) * dtype.itemsize
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})

    def _stored(self, tensors: Tensors, dtype: torch.dtype) -> Iterator["Stored"]:
        """All tensors of theirs, in our order."""
        for name, parts in self._layout.parts.items():
            for part in parts:
                copies = [] if self._exported.options.tied else self._layout.called(part)[1:]
                for theirs in (*self._layout.doubled(part), *copies):
                    numel = torch.Size(part.shape).numel()
                    yield theirs, numel, partial(_read_part, tensors, name, part, dtype)
        o = self._exported.options
        for name in self._layout.tables:
            yield name, o.context * o.width, lambda: sinusoids(o.context, o.width, halves=True).to(dtype)

    # --- what is said of them --------------------------------------------------------------------------------------

    def _config(self, dtype: torch.dtype) -> dict[str, Any]:
        labels = self._exported.label_names
        found = {
            "architectures": [self._architecture.theirs],
            **self._family.config(self._exported.options),
            "vocab_size": self._exported.vocab_size,
            "dtype": _NAMES[dtype],
            **self._token_ids(),
        }
        if labels:
            found["id2label"] = {str(number): name for number, name in enumerate(labels)}
            found["label2id"] = {name: number for number, name in enumerate(labels)}
            kind = "multi" if self._exported.several_labels else "single"
            found["problem_type"] = f"{kind}_label_classification"
        return found

    def _generation(self) -> dict[str, Any]:
        """Its own, since transformers would else take what the family's class has: BART's forced end, for one."""
        return {**self._token_ids(), "max_length": self._exported.options.context, "_from_model_config": False}

    def _token_ids(self) -> dict[str, int | None]:
        special = self._exported.special_tokens
        found = {f"{role}_token_id": special.get(role) for role in ("bos", "eos", "pad")}
        if self._exported.model != "Seq2Seq":
            return found
        pad = special.get("pad", special.get("eos"))
        found |= {"pad_token_id": pad, "decoder_start_token_id": self._exported.target_begin}
        return found | dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"))

    def _write_tokenizer(self, folder: Path, tokenizer: Path) -> None:
        from tokenizers import Tokenizer

        write(folder / TOKENIZER, partial(shutil.copyfile, tokenizer))
        named = Tokenizer.from_file(str(tokenizer))
        roles = {role: self._exported.special_tokens[role] for role in ROLES if role in self._exported.special_tokens}
        names = {f"{role}_token": named.id_to_token(number) for role, number in roles.items()}
        types = ["token_type_ids"] if self._exported.options.token_types else []
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self._exported.options.context,
            "model_input_names": ["input_ids", *types, "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        write_json(folder / "tokenizer_config.json", {**settings, **names})
        write_json(folder / "special_tokens_map.json", names)


Stored = tuple[str, int, Callable[[], torch.Tensor]]  # name, how many numbers, what makes it


def _shared_out(stored: Iterator[Stored], itemsize: int, file_bytes: int) -> list[list[Stored]]:
    """Files of at most ``file_bytes``, unless one tensor is larger."""
    files: list[list[Stored]] = [[]]
    size = 0
    for one in stored:
        length = one[1] * itemsize
        if files[-1] and size + length > file_bytes:
            files.append([])
            size = 0
        files[-1].append(one)
        size += length
    return files


def _read_part(tensors: Tensors, name: str, part: Part, dtype: torch.dtype) -> torch.Tensor:
    """As theirs has it. Errors: ConfigError where a number is too large for ``dtype``."""
    place = Rect((part.begin, *(0 for _ in part.shape[1:])), part.shape)
    found = tensors.read(name, [place])
    turned = part.to_theirs(found).to(dtype)
    if dtype == torch.float16 and not turned.isfinite().all() and found.isfinite().all():
        raise ConfigError(
            f"{name} has numbers up to {found.abs().max():g}, which fp16 does not hold; take bf16 or fp32"
        )
    return turned.clone(memory_format=torch.contiguous_format)
