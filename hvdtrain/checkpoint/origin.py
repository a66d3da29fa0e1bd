"""Where the weights of a run's first step come from (``model.from``): another run, or a Hugging Face folder.

    model_under    its shape, a preset under the user's own keys     small files are read, as the settings are
    Origin         its tensors under our names                       one replica reads them; the others get them from it
    take_over      they, or their first rows, in a model             what is new there keeps how it began by the seed

A run that goes on has its own checkpoints, and its config.yaml knows the shape: the folder is not looked at again.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError, model_validator

from hvdtrain.checkpoint.parameters import Named, Parameters, without_adapters
from hvdtrain.checkpoint.reader import Checkpoint
from hvdtrain.checkpoint.retention import folder_of, steps_saved
from hvdtrain.checkpoint.valid import judge
from hvdtrain.comm.group import Group
from hvdtrain.errors import CheckpointError, ConfigError, DataError
from hvdtrain.files import exists, file_sha256, listed, read_text
from hvdtrain.models.depth import grouped
from hvdtrain.models.hf.pretrained import Pretrained
from hvdtrain.models.lora import LoraOptions
from hvdtrain.models.options import TransformerOptions
from hvdtrain.models.presets import PRESETS
from hvdtrain.options import option
from hvdtrain.slices import Rect, Slice, Tensors, whole_rect
from hvdtrain.strict_yaml import parse_yaml

FromWeights = Literal["auto", "raw", "ema"]


class ModelOptions(TransformerOptions):
    """The shape of a model, and what it is made of: ``from_`` is called ``from`` in recipes."""

    from_: str = option(
        "",
        "folder that the first weights come from, and the shape with them: a run of ours, or config.json and "
        "safetensors of Hugging Face; empty: they are random",
        alias="from",
    )
    from_weights: FromWeights = option(
        "auto", "of a run of ours: those of its last step, or their average; auto: the average where there is one"
    )
    from_digest: str = option(
        "", "what that folder must hold, as its run found it: digits of a SHA-256; empty: whatever it holds"
    )
    lora: LoraOptions | None = option(None, "low-rank adapters are trained, and the weights beside them are not")

    @property
    def shape(self) -> TransformerOptions:
        """Alone, without where it comes from."""
        return TransformerOptions(**{name: getattr(self, name) for name in TransformerOptions.model_fields})

    @model_validator(mode="after")
    def _adapters_fit(self) -> "ModelOptions":
        if self.lora is not None and not self.from_:
            raise ValueError("lora adapts weights that are there: give from, the folder that they come from")
        return self


# May be another than where the weights come from; all else is what these weights were trained with.
_MAY_DIFFER = {"dropout", "context", "window", "rotary", "vocab_multiple", "preset", "init"}
_OWN = ("from", "from_weights", "from_digest", "lora")
# Keys that say the same thing in several ways: what is compared.
_MEANS = {
    "ff_ratio": lambda o: o.hidden_width,
    "ff_width": lambda o: o.hidden_width,
    "kv_heads": lambda o: o.kv_heads or o.heads,
    "head_width": lambda o: o.width_of_head,
    "encoder_layers": lambda o: o.encoder_layers or o.layers,
    "qkv_bias": lambda o: o.biased_qkv,
}
_HEAD = "head"  # what a model calls its part between the last block and the loss


@dataclass(frozen=True)
class Origin:
    """``options``: of the model, all of them. ``files``: whose bytes make its digest.

    about: which weights of the folder they are, in words: "step 200, ema". head_of: the task or the class of model that
    its head belongs to. labels: that it tells apart, in order; empty: not known. unread: tensors there that no model of
    ours has. tokenizer_sha256, tokenizer: of its tokenizer.json, and where it lies; None: not known. checkpoint: of a
    run, whose parts have digests.
    """

    folder: Path
    about: str
    options: Mapping[str, Any]
    tensors: Named
    files: Sequence[Path]
    head_of: str = ""
    labels: tuple[str, ...] = ()
    unread: Sequence[str] = ()
    tokenizer: Path | None = None
    tokenizer_sha256: str | None = None
    checkpoint: Path | None = None


# --- the shape ---------------------------------------------------------------------------------------------------


def model_under(asked: dict[str, Any], run_dirs: Sequence[Path] = ()) -> dict[str, Any]:
    """The keys of ``model`` with those that ``from`` brings under them. asked: as the user gave them, not checked yet.

    run_dirs: a run that has checkpoints there goes on from them, and knows what its model was.
    Errors: ConfigError where keys contradict the folder's, CheckpointError where it cannot be read.
    """
    folder, weights = asked.get("from", ""), asked.get("from_weights", "auto")
    if not isinstance(folder, str) or not folder or weights not in ("auto", "raw", "ema"):
        return asked
    for run_dir in run_dirs:
        known = _model_of(run_dir) if steps_saved(run_dir) else {}
        if known.get("from") == folder:
            return _over(known, asked)
    origin = open_origin(Path(folder), weights)
    _check_shape(asked, origin)
    return _over(origin.options, asked)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` on top of ``below``, group by group."""
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], Mapping) and isinstance(above[key], Mapping):
            merged[key] = _over(below[key], above[key])
    return merged


def _check_shape(asked: Mapping[str, Any], origin: Origin) -> None:
    theirs = TransformerOptions.model_validate(dict(origin.options))
    asked = {**PRESETS.get(str(asked.get("preset")), {}), **asked}
    shape = {key: value for key, value in asked.items() if key not in _OWN}
    try:
        ours = TransformerOptions.model_validate(_over(origin.options, shape))
    except ValidationError:
        return  # which says so itself
    differing = []
    for key in sorted(shape.keys() - _MAY_DIFFER):
        value, known = (_MEANS.get(key, lambda o, key=key: getattr(o, key))(o) for o in (ours, theirs))
        if value != known:
            differing.append(f"model.{key}={shape[key]} (there {getattr(theirs, key)})")
    if differing:
        raise ConfigError(f"{', '.join(differing)}: model.from={origin.folder} has another shape; leave such keys out")


# --- what a folder holds -----------------------------------------------------------------------------------------


def open_origin(folder: Path, weights: FromWeights = "auto") -> Origin:
    """What lies in ``folder`` (local; no tensor is read). weights: see ModelOptions.

    Errors: CheckpointError where it is neither of the two, or damaged; ConfigError for an average that is not there.
    """
    if exists(folder / "config.yaml"):
        return _open_run(folder, weights)
    if exists(folder / "config.json"):
        return _open_pretrained(folder)
    neither = "neither a run (config.yaml) nor a Hugging Face folder (config.json)"
    raise CheckpointError(f"model.from={folder} is {neither if exists(folder) else 'not there'}")


def _open_pretrained(folder: Path) -> Origin:
    found = Pretrained(folder)
    return Origin(
        folder,
        found.model,
        TransformerOptions(**found.options).model_dump(),
        found,
        files=[folder / "config.json", *listed(folder, "*.safetensors")],
        head_of=found.model,
        labels=() if found.label_names[:1] == ("LABEL_0",) else tuple(found.label_names),
        unread=found.left_over,
        tokenizer=found.tokenizer,
    )


def _open_run(folder: Path, weights: FromWeights) -> Origin:
    tree = _config_of(folder)
    model = ModelOptions.model_validate(tree.get("model", {}))
    saved = _newest(folder)
    parameters = Parameters(saved, None if weights == "auto" else weights)
    identity, carried = saved.progress.identity or {}, folder / "data" / "tokenizer.json"
    return Origin(
        folder,
        f"step {saved.progress.step}, {parameters.weights}",
        {key: value for key, value in model.model_dump(by_alias=True).items() if key not in _OWN},
        without_adapters(parameters, model, model.lora),
        files=[saved.folder / "manifest.json"],
        head_of=tree.get("task", {}).get("name", ""),
        labels=tuple(identity.get("label_names", ())),
        tokenizer=carried if exists(carried) else None,
        tokenizer_sha256=identity.get("tokenizer_sha256"),
        checkpoint=saved.folder,
    )


def _newest(folder: Path) -> Checkpoint:
    """The newest checkpoint whose manifest is whole."""
    steps, problem = steps_saved(folder), None
    for step in steps:
        try:
            return Checkpoint(folder_of(folder, step))
        except CheckpointError as error:
            problem = problem or error
    raise problem or CheckpointError(f"model.from={folder} has no checkpoint yet")


def _model_of(run_dir: Path) -> dict[str, Any]:
    try:
        model = _config_of(run_dir).get("model", {})
    except CheckpointError:
        return {}
    return model if isinstance(model, dict) else {}


def _config_of(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    try:
        tree = parse_yaml(read_text(path), str(path))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} is damaged: it is no mapping of keys to values")
    return tree


# --- whole, and the same as before -------------------------------------------------------------------------------


def digest_of(origin: Origin, group: Group) -> str:
    """16 hex digits that change with any byte of its weights; each file is read by one rank (collective).

    Errors: on all ranks, CheckpointError where a part is damaged.
    """
    if origin.checkpoint is not None:
        _, problem = judge(origin.checkpoint, group)
        group.together(lambda: _refuse_damaged(problem))
    mine = list(enumerate(origin.files))[group.rank :: group.size]
    digests = group.together(lambda: {number: file_sha256(path) for number, path in mine})
    found = {number: digest for one in group.all_gather_object(digests) for number, digest in one.items()}
    text = "".join(f"{path.name} {found[number]};" for number, path in enumerate(origin.files))
    return hashlib.sha256(f"{text} {origin.about}".encode()).hexdigest()[:16]


def _refuse_damaged(problem: str | None) -> None:
    if problem is not None:
        raise CheckpointError(f"model.from: {problem}; move that checkpoint away to begin with the one before it")


def check_tokens(origin: Origin, shards: Path, tokenizer_sha256: str) -> list[str]:
    """Are its tokens those of the ``shards``, which were made by the tokenizer of that digest? Returns notes.

    Files that differ but give a text the same tokens pass: data_prep changes some (limits, padding), others are only
    laid out anew.
    Errors: DataError.
    """
    if origin.tokenizer is None and origin.tokenizer_sha256 is None:
        return [f"{origin.folder} has no tokenizer.json: nothing tells whether the shards were made with its tokens"]
    known = origin.tokenizer_sha256 or file_sha256(origin.tokenizer)
    if known == tokenizer_sha256:
        return []
    if origin.tokenizer is not None and _tokens(origin.tokenizer) == _tokens(shards / "tokenizer.json"):
        return []
    where = origin.tokenizer or f"the tokenizer of {origin.folder}"
    raise DataError(
        f"{shards} was made with another tokenizer ({tokenizer_sha256[:12]}) than model.from={origin.folder} "
        f"({known[:12]}): its numbers mean other tokens; prepare the data with --tokenizer {where}"
    )


def _tokens(path: Path) -> tuple[Any, ...]:
    """What decides which numbers a text becomes: ids, merges, and how the text is written before."""
    try:
        fields = json.loads(read_text(path))
        model = fields["model"]
        vocabulary = model["vocab"]
        ids = dict(vocabulary) if isinstance(vocabulary, dict) else {one[0]: n for n, one in enumerate(vocabulary)}
        ids |= {token["content"]: token["id"] for token in fields.get("added_tokens", [])}
        merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model.get("merges", [])]
        return ids, merges, fields.get("normalizer")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a tokenizer file ({type(error).__name__}: {error})") from None


# --- into a model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TakenOver:
    """Parameters by name: which came from there, which are new, and which of theirs nobody took; and what to say."""

    taken: Sequence[str]
    new: Sequence[str]
    left_over: Sequence[str]
    notes: Sequence[str]

    def fields(self, origin: Origin) -> dict[str, Any]:
        """For the run's record."""
        names = {"taken": len(self.taken), "new": list(self.new), "left_over": list(self.left_over)}
        return {"folder": str(origin.folder), "weights": origin.about, **names, "notes": list(self.notes)}

    def in_words(self, origin: Origin) -> str:
        new = f"; new, by the seed: {grouped(self.new)}" if self.new else ""
        left = f"; left over: {grouped(self.left_over)}" if self.left_over else ""
        return f"{len(self.taken)} tensors from {origin.folder} ({origin.about}){new}{left}"


@dataclass(frozen=True)
class Beginner:
    """What begins: the names of its task and of its model's class, the tokens that occur, and its labels in order."""

    task: str
    model: str
    vocab_size: int
    labels: tuple[str, ...] = ()


def take_over(origin: Origin, slices: Sequence[Slice], ours: Beginner) -> TakenOver:
    """Copy into ``slices`` what ``origin`` has of them (local). A parameter that it has not stays as it is, and so do
    the positions that it never learned, of a longer context: BERT begins with rows of 128, and goes on with 512.

    Errors: ConfigError where shapes differ in another way than in rows of positions and of padding.
    """
    taken: dict[str, str] = {}
    has_head, notes = _has_its_head(origin, ours)
    new, wrong, longer = [], [], list[Slice]()
    for piece in slices:
        name = _name_there(piece.name, origin) if has_head or not _is_of_head(piece.name) else None
        whole = None if name is None else origin.tensors.whole(name)[0]
        shared = None if whole is None else _shared(piece, whole, ours.vocab_size)
        if shared is not None:
            taken[piece.name] = name
            _copy(origin.tensors, name, piece, shared)
            notes += [] if shared.shape == tuple(whole) else [f"{name}: the first {shared.shape[0]} of {whole[0]} rows"]
            if _is_of_positions(piece) and piece.whole[0] > whole[0]:
                longer.append(piece)
                notes.append(f"{piece.name}: rows from {whole[0]} to {piece.whole[0] - 1} are new")
            continue
        new.append(piece.name)
        if whole is not None:
            shapes = f"{piece.name} is {list(piece.whole)} here, and {name} {list(whole)} there"
            (notes if _is_of_head(piece.name) else wrong).append(shapes)
    if wrong:
        raise ConfigError(f"model.from={origin.folder} does not fit: {'; '.join(wrong[:5])}")
    random = {*new, *(piece.name for piece in longer)}
    still = [piece.name for piece in slices if piece.name in random and not piece.tensor.requires_grad]
    if still:
        raise ConfigError(
            f"{grouped(still)}: not in model.from={origin.folder}, and frozen, so it would stay as random as it began; "
            "let it be trained (optim.freeze without it, model.lora.also with it)"
        )
    left_over = [*sorted(set(origin.tensors.names) - set(taken.values())), *origin.unread]
    return TakenOver(list(taken), new, left_over, notes)


def merged(found: Sequence[TakenOver | None], origin: Origin) -> TakenOver:
    """What the ranks of a replica have taken together (local). Errors: ConfigError where nothing fits."""
    parts = [one for one in found if one is not None]
    taken = list(dict.fromkeys(name for one in parts for name in one.taken))
    new = list(dict.fromkeys(name for one in parts for name in one.new))
    notes = list(dict.fromkeys(note for one in parts for note in one.notes))
    left_over = [name for name in parts[0].left_over if all(name in one.left_over for one in parts)]
    if not taken:
        raise ConfigError(
            f"model.from={origin.folder} has nothing of this model, made of {grouped(new)}; "
            f"it holds {grouped(left_over)}"
        )
    return TakenOver(taken, new, left_over, notes)


def _has_its_head(origin: Origin, ours: Beginner) -> tuple[bool, list[str]]:
    """Is the head one for the same thing? And what to say where it is only for other labels."""
    if origin.head_of not in (ours.task, ours.model):
        return False, []
    if origin.labels and ours.labels and origin.labels != ours.labels:
        return False, [f"the head is new: labels are {', '.join(ours.labels)} here, {', '.join(origin.labels)} there"]
    return True, []


def _name_there(name: str, origin: Origin) -> str | None:
    """What ``origin`` calls the parameter; None: it has none."""
    there = set(origin.tensors.names)
    return next((other for other in _names(name) if other in there), None)


def _names(name: str) -> Iterator[str]:
    """Where one task's model has ``encoder.blocks``, another's has ``encoder_blocks``, or ``blocks`` alone."""
    yield name
    if _is_of_head(name):
        return
    for prefix in ("encoder.", "encoder_"):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            yield from (f"{'encoder_' if prefix == 'encoder.' else 'encoder.'}{rest}", rest)
            return
    yield f"encoder.{name}"


def _is_of_head(name: str) -> bool:
    return name.partition(".")[0] == _HEAD


def _shared(piece: Slice, there: torch.Size, vocab_size: int) -> Rect | None:
    """The rectangle that both whole tensors have; None: they are not the same thing."""
    here = piece.whole
    if here == there:
        return whole_rect(here)
    if here[1:] != there[1:] or not here or len(there) != len(here):
        return None
    is_vocabulary = min(here[0], there[0]) >= vocab_size and (
        piece.name.endswith("embedding.weight") or _is_of_head(piece.name)
    )
    return whole_rect((min(here[0], there[0]), *here[1:])) if _is_of_positions(piece) or is_vocabulary else None


def _is_of_positions(piece: Slice) -> bool:
    """A row for each of ``model.context`` positions."""
    return piece.name.endswith("position.weight")


@torch.no_grad()
def _copy(tensors: Tensors, name: str, piece: Slice, shared: Rect) -> None:
    for part in piece.rectangles():
        (place,) = part.places
        if (common := place.common(shared)) is not None:
            part.tensor[common.index_in(place)] = tensors.read(name, [common]).to(part.tensor.dtype)
