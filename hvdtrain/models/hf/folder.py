"""A Hugging Face folder as it lies there: config.json, tensors under their own names, the roles of tokens.

DIR/config.json                      what the model is
    model.safetensors                its tensors; or several files, and which of them holds which:
    model.safetensors.index.json     {"weight_map": {tensor: file}}
    tokenizer.json, tokenizer_config.json, special_tokens_map.json
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from hvdtrain.errors import CheckpointError, DataError, OutputError
from hvdtrain.files import again, exists, listed, read_json

T = TypeVar("T")

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROLES = ("eos", "pad", "bos", "unk", "mask", "sep", "cls")


def read_config(folder: Path) -> dict[str, Any]:
    """Errors: CheckpointError."""
    if not exists(folder / CONFIG):
        raise CheckpointError(
            f"{folder} is no folder of a Hugging Face model: it has no {CONFIG}; give one that has it beside its "
            "*.safetensors files"
        )
    return _read_json(folder / CONFIG)


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """Role -> id, for the roles that are named: in the tokenizer's files, or else by id in config.json."""
    found = {role: config.get(f"{role}_token_id") for role in ROLES}
    if exists(folder / TOKENIZER):
        fields = _read_json(folder / TOKENIZER)
        vocab = fields.get("model", {}).get("vocab", {})
        ids = dict(vocab) if isinstance(vocab, dict) else {row[0]: number for number, row in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in fields.get("added_tokens", [])}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            said = _read_json(folder / file) if exists(folder / file) else {}
            for role in ROLES:
                name = said.get(f"{role}_token")
                name = name.get("content") if isinstance(name, dict) else name
                if name in ids:
                    found[role] = ids[name]
    return {role: number for role, number in found.items() if type(number) is int}


class TheirTensors:
    """The tensors of a folder, of which a caller reads parts (local).

    A name counts without the family's ``prefix``, which some folders have and some have not, and with ``weight`` and
    ``bias`` for the ``gamma`` and ``beta`` of the first BERT.

    Opening it reads headers alone. Errors, of every method: CheckpointError.
    """

    def __init__(self, folder: Path, prefix: str):
        self.folder, self._prefix = folder, prefix
        self._open_files: dict[Path, Any] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path, name in self._find():
            if self._plain(name) in self._places:
                raise CheckpointError(f"{folder} holds {self._plain(name)} twice: as {self._place(name)[1]} and {name}")
            self._places[self._plain(name)] = path, name

    def __contains__(self, name: str) -> bool:
        return self._plain(name) in self._places

    def others(self, than: set[str]) -> list[tuple[str, str]]:
        """(name without the prefix, name as it stands there) of all tensors but these."""
        used = {self._plain(name) for name in than}
        return [(plain, name) for plain, (_, name) in sorted(self._places.items()) if plain not in used]

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, and type as safetensors calls it."""
        lazy = self._slice(name)
        return tuple(lazy.get_shape()), lazy.get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """A rectangle of a tensor; no more bytes of the file are touched."""
        return self._reading(lambda: self._slice(name)[index])

    def _find(self) -> Iterator[tuple[Path, str]]:
        if exists(self.folder / INDEX):
            yield from self._indexed()
            return
        path = self.folder / ONE_FILE
        if not exists(path):
            raise CheckpointError(self._nothing_there())
        for name in self._open(path).keys():  # noqa: SIM118
            yield path, name

    def _indexed(self) -> Iterator[tuple[Path, str]]:
        weight_map = _read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{self.folder / INDEX} is damaged (it has no weight_map of tensors to files)")
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise CheckpointError(f"{self.folder / INDEX} names a file outside its folder: {file!r}")
            if name not in self._open(self.folder / file).keys():  # noqa: SIM118
                raise CheckpointError(f"{self.folder / file} does not hold {name}, which {INDEX} says")
            yield self.folder / file, name

    def _nothing_there(self) -> str:
        try:
            names = [path.name for path in listed(self.folder)]
        except OSError as error:
            raise OutputError(f"cannot look into {self.folder}: {error.strerror}") from None
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"))]
        if not pickles:
            return f"{self.folder} has neither {ONE_FILE} nor {INDEX}"
        return (
            f"{self.folder} has {pickles[0]} and no {ONE_FILE}: a pickle can run any code as it is read, and is not; "
            "convert it where you trust it, with transformers:  python -c 'import sys, transformers as t; "
            "c = t.AutoConfig.from_pretrained(sys.argv[1]); "
            "getattr(t, c.architectures[0]).from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])' "
            f"{self.folder} NEW_DIR"
        )

    def _slice(self, name: str) -> Any:
        path, stored = self._place(name)
        return self._reading(lambda: self._open(path).get_slice(stored))

    def _place(self, name: str) -> tuple[Path, str]:
        return self._places[self._plain(name)]

    def _plain(self, name: str) -> str:
        name = name.removeprefix(self._prefix)
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(old):
                return name.removesuffix(old) + new
        return name

    def _open(self, path: Path) -> Any:
        if path not in self._open_files:
            opened = self._reading(lambda: again(lambda: safe_open(path, framework="pt", device="cpu"), path), path)
            self._open_files[path] = opened
        return self._open_files[path]

    def _reading(self, work: Callable[[], T], path: Path | None = None) -> T:
        try:
            return work()
        except FileNotFoundError:
            raise CheckpointError(f"{path or self.folder} is missing, which {INDEX} names") from None
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"cannot read {path or self.folder}: {reason}; copy it once more") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except DataError as error:
        raise CheckpointError(str(error)) from None
