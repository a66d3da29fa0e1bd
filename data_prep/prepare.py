"""Make shards of a reader's items: shared by ranks, resumable, the same bytes for every number of ranks.

    DIR/.parts/identity.json    what is being prepared; another preparation's leftovers are not used
    DIR/.parts/00012.json       unit 12 is done: its shards, digests and counts
    DIR/train-00012.h5          its documents for training, val-00012.h5 those for validation
    DIR/train-00012_001.h5      more of them, where the unit is a compressed file that holds more than a shard shall
    DIR/manifest.json           written from all records when the last unit is done; then .parts goes

A unit's shards are written first, then its record, each beside its final name and renamed. So a preparation that was
killed goes on with the units that have no record, on any number of ranks.
"""

import errno
import fcntl
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from data_prep import duplicates
from data_prep.bad import NAMED, Counts
from data_prep.corpus import files_sha256
from data_prep.encoder import TokenEncoder, UnknownWord
from data_prep.gathering import Gathering
from data_prep.pieces import Piece, Unit, gather, share
from data_prep.progress import ProgressBar
from data_prep.readers import Item, Reader
from data_prep.sample import sample_texts
from data_prep.tokenizer_file import TokenizerFile
from hvdtrain.comm.ranks import Ranks
from hvdtrain.data.shards import (
    SHARD_NAME,
    SPLITS,
    Manifest,
    ShardInfo,
    check_files,
    read_manifest,
    token_dtype,
    tokenizer_vocab_size,
    write_manifest,
)
from hvdtrain.errors import ConfigError, DataError, OutputError, say
from hvdtrain.files import again, exists, file_sha256, listed, make_folder, read_json, write, write_json

_BATCH_BYTES = 1 << 23  # of text encoded at once; bounds the memory
_TEMPORARY = re.compile(rf"\.({SHARD_NAME.pattern}|manifest\.json|tokenizer\.json)\.\d+\.tmp")
_RECORDS = ".parts"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as on Lustre that is mounted without flock


@dataclass(frozen=True)
class PrepareOptions:
    """``val_fraction``: this part of the documents goes to validation. ``val_split``: ``hash`` chooses a document by a
    digest of its text, whatever else there is; ``tail`` takes the last bytes and cuts a document where it must.
    ``shard_tokens``: about so many tokens are in a shard. ``deduplicate``: of equal documents only the first is kept.
    """

    val_fraction: float = 0.01
    val_split: str = "hash"
    shard_tokens: int = 1 << 25
    deduplicate: bool = False


class Kind(Protocol):
    """What text, pairs, labels and questions differ in."""

    name: str
    reader: Reader
    label_names: tuple[str, ...]

    @property
    def version(self) -> int:
        """Of the shards' format."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide what the shards hold, besides the reader's."""

    def begin(self, encoder: TokenEncoder) -> None:
        """Before anything is encoded (local)."""

    def scan(self, splits_of: "SplitsOf", units: Sequence[Unit], mine: Sequence[int], ranks: Ranks) -> None:
        """Look at all items before the first is encoded, where that is needed (collective)."""

    def encode(self, items: list[Item], counts: Counter) -> dict[str, np.ndarray]:
        """Items of one split as datasets of a shard, but lengths in place of offsets."""


class SplitsOf:
    """Which split does an item belong to, and what is its digest? ``kept``: digests of items that stay in training,
    though chance gave them to validation.
    """

    kept: frozenset[bytes] = frozenset()

    def __init__(self, options: PrepareOptions):
        by_hash = options.val_fraction if options.val_split == "hash" else 0.0
        self._limit = int(by_hash * (1 << 64)).to_bytes(9, "big")[-8:] if by_hash else bytes(8)

    def __call__(self, item: Item, piece: Piece) -> tuple[str, bytes]:
        digest = hashlib.sha256(item[0] if len(item) == 1 else b"\0".join(item)).digest()
        return piece.split or ("val" if digest[:8] < self._limit and digest not in self.kept else "train"), digest


def prepare(
    kind: Kind, options: PrepareOptions, tokenizer: TokenizerFile, out: Path, ranks: Ranks
) -> tuple[Manifest, bool]:
    """Write shards, tokenizer and manifest into ``out``; returns the manifest and whether it was there before.

    Every rank calls this. It goes on with a preparation that was interrupted, and keeps one that is complete and of the
    same input. Errors: DataError for bad text, ConfigError where ``out`` holds other shards, OutputError when
    writing fails.
    """
    encoder = _agreed_encoder(kind.reader, tokenizer, ranks)
    preparation = ranks.together(lambda: _Preparation(kind, options, tokenizer, encoder, out, ranks))
    ranks.agree(preparation.identity, "what is to be prepared")
    with ranks.on_main(lambda: _locked(out)) or nullcontext():
        if ranks.together(lambda: exists(out / "manifest.json")):
            return preparation.reuse(), True
        ranks.together(preparation.clear_leftovers)
        return preparation.run(), False


def _agreed_encoder(reader: Reader, tokenizer: TokenizerFile, ranks: Ranks) -> TokenEncoder:
    """The same on all ranks, each of which compares the libraries on a part of the sample (collective)."""
    mine = slice(ranks.rank, None, ranks.size)
    encoder = ranks.together(lambda: TokenEncoder(tokenizer, sample_texts(reader), mine))
    encoder.agree(ranks.all_gather_object(encoder.note))
    return encoder


class _Preparation:
    """One preparation on one rank."""

    def __init__(
        self,
        kind: Kind,
        options: PrepareOptions,
        tokenizer: TokenizerFile,
        encoder: TokenEncoder,
        out: Path,
        ranks: Ranks,
    ):
        self.kind, self.options, self.out, self.ranks = kind, options, out, ranks
        self.records_dir = out / _RECORDS
        self.tokenizer, self.encoder = tokenizer, encoder
        kind.begin(encoder)
        self.unit_bytes = max(1, int(options.shard_tokens * self.encoder.bytes_per_token))
        tail = options.val_fraction if options.val_split == "tail" else 0.0
        self.units = gather(kind.reader.pieces(self.unit_bytes, tail), self.unit_bytes)
        self.mine = share([unit.weight for unit in self.units], ranks.size)[ranks.rank]
        self.splits_of = SplitsOf(options)
        self.identity = {
            "kind": kind.name,
            **asdict(options),
            **kind.reader.identity(),
            **kind.identity(),
            "tokenizer_sha256": hashlib.sha256(tokenizer.content).hexdigest(),
            "special_tokens": tokenizer.special,
            "files": len(kind.reader.files),
            "files_sha256": files_sha256(kind.reader.files),
        }

    def run(self) -> Manifest:
        """Make what is missing, then the manifest (collective)."""
        self._announce()
        self.kind.scan(self.splits_of, self.units, self.mine, self.ranks)
        dropped = self._find_duplicates() if self.options.deduplicate else duplicates.NONE
        # One unit waits for the disk while the next is encoded.
        with ProgressBar(self.units, self.records_dir, self.ranks) as progress, ThreadPoolExecutor(1) as behind:
            last = behind.submit(lambda: None)
            for number in self.mine:
                unit = self.units[number]
                if not self._is_done(unit, dropped):
                    made = self._made_or_its_file_named(unit, dropped, progress)
                    last.result()
                    last = behind.submit(self._write, unit, *made)
                progress.unit_done(number)
            last.result()
            progress.wait_for_others()
        self.ranks.barrier()
        self.ranks.on_main(self._finish)
        return self.ranks.together(lambda: read_manifest(self.out))

    def reuse(self) -> Manifest:
        """The finished preparation in ``out``, if it is this one (collective)."""

        def compare() -> tuple[Manifest, list[int]]:
            manifest = read_manifest(self.out)
            known = {"special_tokens": manifest.special_tokens, **manifest.source}
            differing = [key for key, value in self.identity.items() if known.get(key) != value]
            stored = manifest.source.get("units", [])
            if not differing and len(stored) != len(self.units):
                differing = ["contents"]  # the sizes are the same, but not the bytes of a token
            elif not differing:
                touched = [n for n in self.mine if stored[n][0] != self.units[n].stamp]
                differing = ["contents"] if any(self._digest(self.units[n]) != stored[n][1] for n in touched) else []
            return manifest, differing

        manifest, differing = self.ranks.together(compare)
        if differing := sorted({key for keys in self.ranks.all_gather_object(differing) for key in keys}):
            raise _on_all_ranks(
                ConfigError(
                    f"{self.out} already holds shards made otherwise (differing: {', '.join(differing)}); "
                    "choose another --out, or remove that folder"
                )
            )

        def check() -> None:
            try:
                check_files(self.out, manifest)
            except DataError as error:
                raise DataError(f"{error}; to prepare it again, remove {self.out}") from None

        self.ranks.together(check)
        return manifest

    def clear_leftovers(self) -> None:
        """Make the folder ready; keep the units of an interrupted preparation only if it was this one (rank 0)."""
        if self.ranks.rank:
            return
        _remove(self.out, _TEMPORARY.fullmatch)
        known = self.records_dir / "identity.json"
        if exists(known) and read_json(known) == self.identity:
            if done := sum(exists(self.records_dir / _record_name(unit)) for unit in self.units):
                say(f"going on with an interrupted preparation: {done} of {len(self.units)} units are there")
            return
        shutil.rmtree(self.records_dir, ignore_errors=True)
        _remove(self.out, SHARD_NAME.fullmatch)
        try:
            make_folder(self.records_dir)
            if self.tokenizer.path.resolve() != (self.out / "tokenizer.json").resolve():
                write(self.out / "tokenizer.json", lambda temporary: temporary.write_bytes(self.tokenizer.content))
            elif self.tokenizer.path.read_bytes() != self.tokenizer.content:
                raise ConfigError(
                    f"{self.tokenizer.path} must be changed for use ({self.tokenizer.notes[-1]}); move it out of --out"
                )
        except OSError as error:
            raise OutputError(f"cannot write to {self.out}: {error.strerror}") from None
        write_json(known, self.identity)

    def _announce(self) -> None:
        if self.ranks.rank:
            return
        for note in self.tokenizer.notes:
            say(f"note: tokenizer {self.tokenizer.path}: {note}")
        if self.encoder.note:
            say(f"note: {self.encoder.note}; tokenizers does the work")
        if len(self.units) < self.ranks.size:
            say(
                f"note: the input is work for only {len(self.units)} of {self.ranks.size} ranks; for more, lower "
                "--shard-tokens; a compressed file is read by one rank"
            )

    def _find_duplicates(self) -> "duplicates.Dropped":
        return duplicates.find(self._hashes, self.units, self.mine, self.records_dir, self.ranks)

    def _hashes(self, unit: Unit) -> Iterator[bytes]:
        for batch in self._batches(unit, Counter()):
            yield b"".join(digest[:16] for _, digest, _ in batch)

    def _batches(self, unit: Unit, counts: Counter) -> Iterator[list[tuple[str, bytes, Item]]]:
        """(split, digest, item) of all items of a unit, in order."""
        for piece in unit.pieces:
            for items in self.kind.reader.items(piece, counts):
                yield [(*self.splits_of(item, piece), item) for item in items]

    def _digest(self, unit: Unit) -> str:
        digest = hashlib.sha256()
        for batch in self._batches(unit, Counter()):
            for _, one, _ in batch:
                digest.update(one)
        return digest.hexdigest()[:32]

    def _others_part(self, unit: Unit, dropped: "duplicates.Dropped") -> str:
        """A digest of what depends on other units too: which documents are left out, which stay in training, and the
        labels' numbers.
        """
        said = (sorted(dropped.of_unit(unit.number)), self.kind.label_names, sorted(self.splits_of.kept))
        return hashlib.sha256(repr(said).encode()).hexdigest()[:16]

    def _is_done(self, unit: Unit, dropped: "duplicates.Dropped") -> bool:
        path = self.records_dir / _record_name(unit)
        if not exists(path):
            return False
        record = read_json(path)
        if record["others_part"] != self._others_part(unit, dropped):
            return False
        for shard in record["shards"]:
            file = self.out / shard["file"]
            if not exists(file) or file.stat().st_size != shard["file_bytes"]:
                return False
        return record["stamp"] == unit.stamp or record["digest"] == self._digest(unit)

    def _made(
        self, unit: Unit, dropped: "duplicates.Dropped", progress: ProgressBar
    ) -> tuple[Gathering, dict[str, Any]]:
        """A unit's tokens and its record, both still to be written."""
        counts = Counts()
        gathering = Gathering(self.out, unit, token_dtype(self.encoder.vocab_size), self.options.shard_tokens)
        waiting: dict[str, list[Item]] = {name: [] for name in SPLITS}
        drop = dropped.of_unit(unit.number)
        digest = hashlib.sha256()
        size = seen = 0
        for batch in self._batches(unit, counts):
            for split, one, item in batch:
                digest.update(one)
                if seen in drop:
                    counts["duplicates"] += 1
                else:
                    waiting[split].append(item)
                    if split == "train" and one in self.splits_of.kept:
                        counts["kept_in_training"] += 1
                    size += sum(map(len, item))
                seen += 1
                if size >= min(_BATCH_BYTES, self.unit_bytes):
                    self._encode(waiting, gathering, counts)
                    gathering.write_if_full()
                    progress.advance(unit.number, size)
                    size = 0
        self._encode(waiting, gathering, counts)
        return gathering, {
            "stamp": unit.stamp,
            "digest": digest.hexdigest()[:32],
            "others_part": self._others_part(unit, dropped),
            "counts": dict(sorted(counts.items())),
            "bad_items": counts.bad_items,
        }

    def _write(self, unit: Unit, gathering: Gathering, record: dict[str, Any]) -> None:
        gathering.write()
        shards = [asdict(shard) for shard in gathering.shards]
        write_json(self.records_dir / _record_name(unit), {**record, "shards": shards})

    def _encode(self, waiting: dict[str, list[Item]], gathering: Gathering, counts: Counter) -> None:
        for split, items in waiting.items():
            if items:
                counts["text_bytes"] += sum(map(len, (text for item in items for text in item)))
                gathering.add(split, self.kind.encode(items, counts))
                items.clear()

    def _made_or_its_file_named(
        self, unit: Unit, dropped: "duplicates.Dropped", progress: ProgressBar
    ) -> tuple[Gathering, dict[str, Any]]:
        try:
            return self._made(unit, dropped, progress)
        except UnknownWord as error:
            raise DataError(f"{self._file_with(unit, error.text.encode())}: {error}") from None

    def _file_with(self, unit: Unit, text: bytes) -> Path:
        """Which file of a unit has an item with this text?"""
        for piece in unit.pieces:
            for item in (item for items in self.kind.reader.items(piece, Counter()) for item in items):
                if text in item:
                    file = piece.file
                    return file.partner.path if file.partner and item.index(text) else file.path
        return unit.pieces[0].file.path  # it was changed meanwhile

    def _finish(self) -> None:
        records = [read_json(self.records_dir / _record_name(unit)) for unit in self.units]
        rows = [row for record in records for row in record["shards"]]
        shards = [ShardInfo(**{**row, "block_sha256": tuple(row["block_sha256"])}) for row in rows]
        if not shards:
            raise DataError("nothing is left of the input: all documents are empty or were left out")
        of_manifest = {shard.file for shard in shards}
        # Those of units that were made anew, after a file had changed.
        _remove(self.out, lambda name: SHARD_NAME.fullmatch(name) and name not in of_manifest)
        counts = sum((Counter(record["counts"]) for record in records), Counter())
        vocab_size = tokenizer_vocab_size(self.out / "tokenizer.json")
        manifest = Manifest(
            vocab_size=vocab_size,
            tokenizer_sha256=file_sha256(self.out / "tokenizer.json"),
            dtype=token_dtype(vocab_size).name,
            shards=tuple(sorted(shards, key=lambda shard: SPLITS.index(shard.split))),  # else by unit and part
            source={
                **self.identity,
                "tokenizer_notes": list(self.tokenizer.notes),
                "documents": sum(shard.documents for shard in shards),
                **counts,
                "bad_items": [item for record in records for item in record["bad_items"]][:NAMED],
                "units": [[unit.stamp, record["digest"]] for unit, record in zip(self.units, records, strict=True)],
            },
            kind=self.kind.name,
            special_tokens=self.tokenizer.special,
            label_names=self.kind.label_names,
            version=self.kind.version,
        )
        write_manifest(self.out, manifest)
        shutil.rmtree(self.records_dir, ignore_errors=True)


def _record_name(unit: Unit) -> str:
    return f"{unit.number:05d}.json"


def _remove(folder: Path, is_doomed: Callable[[str], Any]) -> None:
    """Files of a folder, by their names. Errors: OutputError."""
    try:
        for path in listed(folder):
            if is_doomed(path.name):
                again(partial(path.unlink, missing_ok=True), path)
    except OSError as error:
        raise OutputError(f"cannot remove {error.filename}: {error.strerror}") from None


def _on_all_ranks(error: ConfigError) -> ConfigError:
    error.on_all_ranks = True
    return error


def _locked(out: Path) -> TextIO:
    """One preparation at a time in a folder. The lock goes with the process, however that ends."""
    try:
        make_folder(out)
        handle = open(out / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"cannot write to {out}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        raise ConfigError(
            f"another process is preparing {out}; to share the work, start one job: mpirun -np N python -m data_prep"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"cannot lock {out}: {error.strerror}") from None
        say(f"note: {out} cannot be locked there ({error.strerror}): see that no other process prepares it meanwhile")
    return handle
