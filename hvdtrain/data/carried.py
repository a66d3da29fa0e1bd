"""What a run folder carries of its data, so that it can be used wherever it lies.

    RUN_DIR/data/tokenizer.json    that of all its folders of shards
                 corpora.json      of each of them: absolute path, weight, manifest; written last

Shards are not copied: a model can be made and its text read without them.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from hvdtrain.data.corpora import Corpora, DataOptions, folders_of
from hvdtrain.data.shards import Manifest, check_tokenizer
from hvdtrain.errors import CheckpointError, DataError, OutputError
from hvdtrain.files import again, exists, fields_sha256, make_folder, read_text, write

FORMAT_VERSION = 1
_NAMES = ("tokenizer.json", "corpora.json")


@dataclass(frozen=True)
class Carried:
    """``corpora``: the manifests, and the places where the shards were. ``tokenizer``: a file that is there."""

    corpora: Corpora
    tokenizer: Path


def carry(run_dir: Path, options: DataOptions, corpora: Corpora) -> None:
    """Write into ``run_dir``, which exists, what it needs of ``corpora`` (one rank; at every start of a run).

    options: those that ``corpora`` was opened with, and since then perhaps staged: the shards' own place is recorded.
    Errors: OutputError; DataError where the tokenizer is no longer the one that was checked.
    """
    folder, source = run_dir / "data", corpora.entries[0][0] / "tokenizer.json"
    try:
        tokenizer = again(source.read_bytes, source)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from None
    if hashlib.sha256(tokenizer).hexdigest() != corpora.manifest.tokenizer_sha256:
        raise DataError(f"{source.parent} was prepared again while the run began; start it once more")
    fields = {
        "format": FORMAT_VERSION,
        "folders": [str(place.absolute()) for place in folders_of(options)],
        "weights": list(corpora.weights),
        "manifests": [asdict(manifest) for _, manifest in corpora.entries],
    }
    text = json.dumps({**fields, "corpora_sha256": fields_sha256(fields)}, indent=1)  # ASCII: a path may be any bytes
    try:
        make_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}") from None
    for name, content in zip(_NAMES, (tokenizer, text.encode()), strict=True):
        write(folder / name, lambda temporary, content=content: temporary.write_bytes(content))


def carry_over(run_dir: Path, to: Path) -> None:
    """What ``run_dir`` carries, if anything, into another run folder. Errors: OutputError, OSError."""
    if exists(run_dir / "data" / "corpora.json"):
        make_folder(to / "data")
        for name in _NAMES:
            write(to / "data" / name, partial(shutil.copyfile, run_dir / "data" / name))


def read_carried(run_dir: Path) -> Carried | None:
    """What ``carry`` has written; None: the run is of before there was any.

    Errors: CheckpointError where it is damaged.
    """
    path = run_dir / "data" / "corpora.json"
    try:
        fields = json.loads(read_text(path))
        if fields["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{path} has format version {fields['format']}; this hvdtrain reads {FORMAT_VERSION}")
        if fields.pop("corpora_sha256") != fields_sha256(fields):
            raise ValueError("it does not match its own digest")
        manifests = TypeAdapter(list[Manifest]).validate_json(json.dumps(fields["manifests"]))
        folders, weights = map(Path, fields["folders"]), map(float, fields["weights"])
        corpora = Corpora(tuple(zip(folders, manifests, strict=True)), tuple(weights))
        check_tokenizer(path.parent, corpora.manifest)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, DataError) as error:
        raise CheckpointError(
            f"{path.parent} is damaged ({_short(error)}); copy it from another copy of the run, or remove it: "
            "then the shards are taken from where config.yaml says, seen from this folder"
        ) from None
    return Carried(corpora, path.with_name("tokenizer.json"))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
