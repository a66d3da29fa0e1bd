"""The commands of data preparation."""

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from hvdtrain.errors import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_OK, ConfigError, HvdtrainError, report


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


_fraction.__name__, _positive.__name__ = "fraction (0 to below 1)", "positive number"  # argparse shows these


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="data_prep", description="Turn text into token shards.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    source = argparse.ArgumentParser(add_help=False)
    source.add_argument("--input", type=Path, nargs="+", required=True, metavar="PATH", help="files, or folders")
    source.add_argument("--glob", default="*.txt", help="which files of a folder, at any depth (default: *.txt)")
    source.add_argument(
        "--exclude", nargs="+", default=[], metavar="NAME", help="files or folders to leave out, by name"
    )

    tokenizer = commands.add_parser("tokenizer", parents=[source], help="train a tokenizer")
    tokenizer.add_argument("--kind", choices=["bpe", "char"], default="bpe", help="default: bpe (byte-level)")
    tokenizer.add_argument(
        "--vocab-size", type=_positive, default=32768, metavar="N", help="tokens (bpe; default: 32768)"
    )
    tokenizer.add_argument("--out", type=Path, required=True, metavar="FILE", help="tokenizer.json to write")

    text = commands.add_parser("text", parents=[source], help="tokenise plain text, one document a file")
    text.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="tokenizer.json to use")
    text.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the shards")
    text.add_argument("--val-fraction", type=_fraction, default=0.01, metavar="F", help="for validation; default: 0.01")
    text.add_argument(
        "--val-split", choices=["hash", "tail"], default="hash", help="documents by digest (default), or the last bytes"
    )
    text.add_argument("--shard-tokens", type=_positive, default=1 << 26, metavar="N", help="a shard's; default: 2**26")
    return parser


def _tokenizer(words: argparse.Namespace) -> None:
    from data_prep.corpus import find_files
    from data_prep.tokenizer import train_tokenizer

    files = find_files(words.input, words.glob, words.exclude)
    record = train_tokenizer(files, words.kind, words.vocab_size, words.out)
    how = "kept" if record["reused"] else "trained"
    print(f"{words.out}: {how}, {record['kind']}, {record['vocab_size']:,} tokens, from {record['files']:,} files")


def _text(words: argparse.Namespace) -> None:
    from data_prep.corpus import find_files
    from data_prep.text import TextOptions, prepare_text

    files = find_files(words.input, words.glob, words.exclude)
    options = TextOptions(words.val_fraction, words.val_split, words.shard_tokens)
    started = time.perf_counter()
    manifest, reused = prepare_text(files, words.tokenizer, words.out, options)
    if reused:
        print(f"{words.out}: already prepared from this input, kept")
    seconds, megabytes = time.perf_counter() - started, manifest.source["text_bytes"] / 1e6
    for split in ("train", "val"):
        shards = manifest.split(split)
        if not shards:
            hint = "; training needs some: raise --val-fraction, or use --val-split tail" if split == "val" else ""
            print(f"{words.out}: no document fell to {split}{hint}")
            continue
        print(f"{words.out}: {split} {sum(s.tokens for s in shards):,} tokens in {len(shards)} shards")
    if not reused:
        print(f"{words.out}: {megabytes:.1f} MB of text in {seconds:.1f} s ({megabytes / seconds:.1f} MB/s)")


_COMMANDS = {"tokenizer": _tokenizer, "text": _text}


def main(argv: list[str] | None = None) -> int:
    try:
        words = make_parser().parse_args(argv)
        _COMMANDS[words.command](words)
        return EXIT_OK
    except HvdtrainError as error:
        report(error, is_main=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("data_prep: interrupted; nothing half-written counts, run the same command again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_CRASH


if __name__ == "__main__":
    sys.exit(main())
