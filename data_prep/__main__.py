"""The commands of data preparation."""

import argparse
import atexit
import gc
import hashlib
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.arguments import ALL_ROLES, make_parser
from data_prep.bad import Counts, say_bad
from data_prep.corpus import InputFile, files_sha256
from data_prep.formats import SQUAD, endings_of, notes, resolve
from hvdtrain.comm.ancestors import Launcher
from hvdtrain.comm.ranks import Ranks
from hvdtrain.comm.session import open_ranks
from hvdtrain.comm.terminal import take_terminal, write_whole_lines
from hvdtrain.comm.world import detect_world
from hvdtrain.data.cleaning import Cleaning
from hvdtrain.errors import (
    EXIT_BAD_DATA,
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_OK,
    ConfigError,
    HvdtrainError,
    LaunchError,
    let_rank_0_speak,
    report,
    say,
)
from hvdtrain.machine.cores import set_library_threads, threads_of_rank
from hvdtrain.machine.malloc import keep_freed_memory

if TYPE_CHECKING:
    from data_prep.prepare import Kind
    from data_prep.tokenizer_file import TokenizerFile
    from hvdtrain.data.shards import Manifest

_LEFT_OUT = {
    "duplicates": "duplicates left out",
    "too_short": "below --min-tokens left out",
    "too_long": "above --max-tokens left out",
    "empty_documents": "JSON objects with an empty text left out",
    "empty_side": "pairs with an empty side left out",
    "cut_short": "cut at --max-tokens",
    "labels_twice": "labels that were said before of the same text",
    "kept_in_training": "of labels that only validation had kept in training",
    "questions_without_answer": "questions that have no answer",
    "questions_unlabelled": "questions of a test set, whose answers are not told",
    "answers_moved": "answers found elsewhere in their paragraph than the file says",
    "answers_in_no_window": "answers that fit no window, so that none has them",
    "questions_cut": "questions cut at --question-tokens",
    "overlapping_windows": "more windows for long paragraphs",
    "replaced_characters": "characters replaced by U+FFFD",
    "byte_order_marks": "byte order marks taken off",
    "quoted_cells": "cells kept with their quotes (--quoted reads these)",
    "unknown_tokens": "tokens that stand for something unknown",
    "dropped_characters": "characters that the tokenizer dropped, for it has no token for them",
}


def main(argv: list[str] | None = None) -> int:
    is_main = True
    atexit.register(gc.freeze)  # or Python looks for circles in all that has been loaded and found
    set_library_threads(os.environ)  # numpy is loaded by the commands, above
    try:
        world = detect_world()
        write_whole_lines(world)
        take_terminal(world)
        Launcher(world).end_with_it()
        is_main = world.is_main
        words = make_parser().parse_args(argv)
        with open_ranks(world) as ranks:
            keep_freed_memory()
            # A million files are a million objects that stay: looking through them for cycles at Python's own rate took
            # 6 % of the time of 22,675 files (AMD EPYC).
            gc.set_threshold(50_000, 20, 20)
            # The libraries that encode would each start a thread for every core of the node.
            os.environ.setdefault("RAYON_NUM_THREADS", str(threads_of_rank(ranks)))
            return _COMMANDS[words.command](words, ranks)
    except HvdtrainError as error:
        report(error, is_main=is_main)
        if isinstance(error, LaunchError):
            let_rank_0_speak()
        return error.exit_code
    except KeyboardInterrupt:
        print("data_prep: interrupted; what is done is kept, run the same command again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_CRASH


def _tokenizer(words: argparse.Namespace, ranks: Ranks) -> int:
    """Rank 0 trains; the others wait, and fail where it fails."""

    def train() -> dict | None:
        if ranks.rank:
            return None
        from data_prep.readers import TextReader
        from data_prep.sample import training_texts
        from data_prep.tokenizer import train_tokenizer
        from data_prep.tokenizer_file import load_tokenizer
        from data_prep.wordpiece import Changes

        reader = TextReader(
            _files(words, ranks, "input"), field=words.field, cleaning=_cleaning(words), skip_bad=words.skip_bad
        )

        def texts(counts: Counter):
            return training_texts(reader, words.sample_mb << 20, words.seed, counts)

        _say_how(reader.files, ranks)
        digest, counts = hashlib.sha256(), Counts()
        for text in texts(counts):
            digest.update(hashlib.sha256(text.encode()).digest())
        identity = {
            "files_sha256": files_sha256(reader.files),
            "sample_sha256": digest.hexdigest(),
            "sample_mb": words.sample_mb,
            "seed": words.seed,
            "nfc": reader.cleaning.nfc,
            **counts,
        }
        asked = words.kind, words.vocab_size, words.special, words.out
        record = train_tokenizer(texts(Counter()), identity, *asked, Changes(words.lower_case, words.strip_accents))
        how = "kept" if record["reused"] else "trained"
        print(
            f"{words.out}: {how}, {record['kind']}, {record['vocab_size']:,} tokens, from {len(reader.files):,} files"
        )
        _say_what_was_mended(words.out, counts, counts.bad_items)
        if words.report:
            from data_prep.vocabulary import vocabulary_report

            print(vocabulary_report(load_tokenizer(words.out).tokenizer(), texts(Counter())).text())
        return record

    ranks.together(train)
    return EXIT_OK


def _text(words: argparse.Namespace, ranks: Ranks) -> int:
    from data_prep.readers import TextReader
    from data_prep.text import TextKind

    def make(tokenizer: "TokenizerFile") -> TextKind:
        files = _files(words, ranks, "input")
        reader = TextReader(files, words.documents, words.field, _cleaning(words), words.skip_bad)
        return TextKind(reader, tokenizer.special["eos"], words.min_tokens, words.max_tokens)

    return _prepare(make, words, ranks)


def _pairs(words: argparse.Namespace, ranks: Ranks) -> int:
    from data_prep.aligned import AlignedReader
    from data_prep.pairs import PairsKind
    from data_prep.tables import TableReader
    from hvdtrain.data.shards import SPLITS

    def make(tokenizer: "TokenizerFile") -> PairsKind:
        sources, targets = _files(words, ranks, "source"), _files(words, ranks, "target")
        tables = _files(words, ranks, "input")
        if bool(sources or targets) == bool(tables):
            raise ConfigError("give either --source and --target, or --input with tables or JSON lines")
        for split in (None, *SPLITS):
            counts = [sum(file.split == split for file in side) for side in (sources, targets)]
            if counts[0] != counts[1]:
                option = "--" if split is None else f"--{split}-"
                raise ConfigError(f"{option}source names {counts[0]} files but {option}target {counts[1]}")
        fields = [words.source_field, words.target_field]
        if tables:
            reader = TableReader(
                tables, fields, words.columns, _cleaning(words), quoted=words.quoted, skip_bad=words.skip_bad
            )
        else:
            reader = AlignedReader(sources, targets, _cleaning(words), words.skip_bad)
        return PairsKind(reader, tokenizer.special["eos"], words.min_tokens, words.max_tokens)

    return _prepare(make, words, ranks)


def _labels(words: argparse.Namespace, ranks: Ranks) -> int:
    from data_prep.label_cells import LabelCells, read_label_names
    from data_prep.labels import LabelsKind
    from data_prep.questions import QuestionsKind, SquadReader
    from data_prep.tables import TableReader
    from hvdtrain.data.shards import frame_tokens

    def make(tokenizer: "TokenizerFile") -> LabelsKind | QuestionsKind:
        files = resolve(_files(words, ranks, "input"), "labels", words.quoted)
        frame = frame_tokens(tokenizer.special)
        squad = [file for file in files if file.how == SQUAD]
        if squad and len(squad) < len(files):
            raise ConfigError(f"SQuAD .json and labelled tables in one folder of shards: {squad[0].path} and others")
        if squad:
            if words.multi_label or words.label_names:
                raise ConfigError(
                    "--multi-label and --label-names are for tables and JSON; SQuAD's questions have none"
                )
            reader = SquadReader(files, _cleaning(words), words.skip_bad)
            most = 384 if words.max_tokens is None else words.max_tokens
            return QuestionsKind(reader, frame, most, words.stride, words.question_tokens)
        fields = [words.label_field, words.field, *([words.second_field] if words.second_field else [])]
        most = 512 if words.max_tokens is None else words.max_tokens
        reader = TableReader(
            files,
            fields,
            words.columns,
            _cleaning(words),
            label=words.label_field,
            quoted=words.quoted,
            skip_bad=words.skip_bad,
        )
        cells = LabelCells(words.multi_label or "", read_label_names(words.label_names))
        return LabelsKind(reader, frame, most, cells)

    return _prepare(make, words, ranks)


def _verify(words: argparse.Namespace, ranks: Ranks) -> int:
    from data_prep.verify import verify

    return EXIT_BAD_DATA if verify(words.folder, ranks, threads_of_rank(ranks)) else EXIT_OK


_COMMANDS = {"tokenizer": _tokenizer, "text": _text, "pairs": _pairs, "labels": _labels, "verify": _verify}


def _prepare(make: Callable[["TokenizerFile"], "Kind"], words: argparse.Namespace, ranks: Ranks) -> int:
    from data_prep.prepare import PrepareOptions, prepare
    from data_prep.tokenizer_file import load_tokenizer

    asked = {role: name for role in ALL_ROLES if (name := getattr(words, role)) is not None}
    tokenizer = ranks.together(lambda: load_tokenizer(words.tokenizer, asked))
    kind = ranks.together(lambda: make(tokenizer))
    fraction = words.val_fraction
    if fraction is None:
        fraction = 0.0 if any(file.split == "val" for file in kind.reader.files) else 0.01
    _say_how(kind.reader.files, ranks)
    options = PrepareOptions(fraction, getattr(words, "val_split", "hash"), words.shard_tokens, words.deduplicate)
    started = time.perf_counter()
    manifest, reused = prepare(kind, options, tokenizer, words.out, ranks)
    if ranks.rank == 0:
        _say_what_was_done(words.out, manifest, reused, time.perf_counter() - started)
    return EXIT_OK


def _say_how(files: Sequence[InputFile], ranks: Ranks) -> None:
    if ranks.rank == 0:
        for note in notes(files):
            say(f"note: {note}")


def _say_what_was_done(out: Path, manifest: "Manifest", reused: bool, seconds: float) -> None:
    from hvdtrain.data.shards import SPLITS

    if reused:
        print(f"{out}: already prepared from this input, kept")
    for split in SPLITS:
        shards = manifest.split(split)
        if not shards and split != "test":
            hint = "; training needs some: raise --val-fraction, or use --val-split tail" if split == "val" else ""
            print(f"{out}: no document fell to {split}{hint}")
        elif shards:
            tokens, targets = sum(s.tokens for s in shards), sum(s.target_tokens for s in shards)
            both = f"{tokens:,} + {targets:,}" if manifest.kind == "pairs" else f"{tokens:,}"
            print(f"{out}: {split} {both} tokens in {len(shards)} shards")
    if manifest.label_names:
        names = ", ".join(manifest.label_names[:10])
        print(f"{out}: {len(manifest.label_names)} labels: {names}{', ...' * (len(manifest.label_names) > 10)}")
    _say_what_was_mended(out, manifest.source, manifest.source["bad_items"])
    if not reused:
        megabytes = manifest.source.get("text_bytes", 0) / 1e6
        print(f"{out}: {megabytes:.1f} MB of text in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)")


def _say_what_was_mended(out: Path, counts: Mapping[str, Any], bad_items: Sequence[str]) -> None:
    if mended := [f"{counts[key]:,} {what}" for key, what in _LEFT_OUT.items() if counts.get(key)]:
        print(f"{out}: {', '.join(mended)}")
    if bad := say_bad(counts):
        print(f"{out}: left out as bad: {bad}")
        for item in bad_items:
            say(f"left out: {item}")


def _files(words: argparse.Namespace, ranks: Ranks, name: str) -> list[InputFile]:
    """The input of all splits: ``--NAME``, ``--val-NAME`` and ``--test-NAME``. Rank 0 says what was left out."""
    from data_prep.finding import Search

    aligned = name in ("source", "target")
    own = [words.out, words.out.parent / f"{words.out.stem}.record.json"]
    if words.command != "tokenizer":
        own = [words.tokenizer, words.out / "tokenizer.json", words.out / "manifest.json"]
    search = Search(
        endings=None if aligned else endings_of(words.command),
        globs=() if aligned else words.glob,
        exclude=words.exclude,
        own=own,
        every_name=aligned,
    )
    found = []
    for prefix, split in (("", None), ("val_", "val"), ("test_", "test")):
        if inputs := getattr(words, f"{prefix}{name}", []):
            found += search.files(inputs, split)
    if ranks.rank == 0:
        for sentence in search.left_out.sentences():
            say(sentence)
    return found


def _cleaning(words: argparse.Namespace) -> Cleaning:
    return Cleaning(words.invalid_utf8, words.normalise == "nfc")


if __name__ == "__main__":
    sys.exit(main())
