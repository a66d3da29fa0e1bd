"""Finds the input files: named one by one, or in folders, which are searched.

What a search leaves out is counted, and some of it named. Every rank finds the same, in the same order.
"""

import errno
import fnmatch
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.corpus import COMPRESSIONS, InputFile
from hvdtrain.data.shards import SHARD_NAME
from hvdtrain.errors import ConfigError, DataError, plural

_NAMED = 3  # of what is left out for one reason
_HEAD = 1 << 12  # bytes that tell whether a file is ours

# Why something of a folder is not read -> what is said of it.
_REASONS = {
    "hidden": "hidden (give its name to --input, or a pattern that begins with a dot to --glob)",
    "excluded": "excluded",
    "own": "of this program (shards, tokenizers, runs)",
    "same": "another name of what is read already",
    "nowhere": "a link that leads nowhere",
    "special": "a pipe, a socket or a device",
}


class LeftOut:
    """What of the folders was not read, and why."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.unmatched = 0
        self._names: dict[str, list[str]] = {reason: [] for reason in _REASONS}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        names = self._names[reason]
        names.append(name)
        if len(names) > 100:  # folders come in no order; the first by name are told
            names[:] = sorted(names)[:_NAMED]

    def add_other(self, name: str) -> None:
        """A file that has none of the endings that are read."""
        path = Path(name.lower())
        self.endings["".join(path.suffixes[-2:]) if path.suffix in COMPRESSIONS else path.suffix] += 1

    def others(self) -> str:
        """``9 .md, 2 .pdf, 1 without an ending``: the files of other endings, the most frequent first."""
        ordered = sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))
        told = [f"{count:,} {ending or 'without an ending'}" for ending, count in ordered[:5]]
        return ", ".join(told + [f"{sum(count for _, count in ordered[5:]):,} others"] * (len(ordered) > 5))

    def sentences(self) -> Iterator[str]:
        """What a user should know, a line each."""
        if count := self.endings.total():
            yield f"{_things(count, 'file')} not read: {self.others()}; --glob names others"
        if self.unmatched:
            yield f"{_things(self.unmatched, 'file')} not read: no --glob matches"
        for reason, what in _REASONS.items():
            if count := self.counts[reason]:
                names = sorted(self._names[reason])[:_NAMED]
                yield f"{count:,} not read, {what}: {', '.join(names)}{', ...' * (count > len(names))}"


def _things(count: int, what: str) -> str:
    return f"{plural(count, what, ',')} {'was' if count == 1 else 'were'}"


@dataclass(frozen=True)
class Search:
    """``endings``: which files of a folder are read, also in capitals and compressed; None: all. ``globs`` instead of
    them: patterns for the name, or with a slash for the end of the path. ``exclude``: names of files and folders.
    ``own``: what the command itself writes, and its tokenizer. ``every_name``: a file that links give several names is
    read under each, where its place in the order counts.
    """

    endings: Sequence[str] | None = None
    globs: Sequence[str] = ()
    exclude: Sequence[str] = ()
    own: Sequence[Path] = ()
    every_name: bool = False
    left_out: LeftOut = field(default_factory=LeftOut)

    def files(self, inputs: Sequence[Path], split: str | None = None) -> list[InputFile]:
        """All input files in a fixed order: the inputs as given, each folder's files by name.

        Errors: ConfigError for an input that is no file, such as a pipe; DataError where one does not exist or cannot
        be read, a folder has none that is read, or all are empty.
        """
        found: list[InputFile] = []
        for path in inputs:
            if path.is_dir():
                found += self._of_folder(path, split)
            else:
                found.append(_input_file(path, path.name, split))
        if not any(file.bytes for file in found):
            raise DataError(f"the input is empty: {len(found)} files, 0 bytes")
        return found

    def _of_folder(self, folder: Path, split: str | None) -> list[InputFile]:
        walk = _Walk(folder, self)
        names = walk.names
        if walk.linked:
            seen = set() if self.every_name else {_identity(folder / name) for name in names}
            for name in sorted(walk.linked):
                identity = _identity(folder / name)
                if identity in seen:
                    self.left_out.add("same", str(folder / name))
                    continue
                names.append(name)
                if not self.every_name:
                    seen.add(identity)
        if not names:
            raise DataError(f"input folder {folder} has no file that is read: {self._wanted()}{self._instead()}")
        return [_input_file(folder / name, name, split) for name in sorted(names)]

    def _wanted(self) -> str:
        if self.globs:
            return f"no name matches {' or '.join(self.globs)} (--glob)"
        return f"none ends in {', '.join(self.endings)}" if self.endings else "it holds no files"

    def _instead(self) -> str:
        told = list(self.left_out.sentences())
        return f" ({'; '.join(told)})" if told else ""


class _Walk:
    """``names`` of the files below a folder that are wanted, relative to it, and ``linked``, of those behind a link.

    Links to folders are followed after all else, and each folder is looked at once: so none leads in circles.
    """

    def __init__(self, top: Path, search: Search):
        self.names: list[str] = []
        self.linked: list[str] = []
        self._top, self._search, self._left_out = str(top), search, search.left_out
        self._matches = _matcher(search.endings, search.globs)
        self._is_asked_for = _matcher_of_hidden(search.globs)
        self._exclude = frozenset(search.exclude)
        self._own: dict[str, set[str]] = {}  # name -> folders
        for path in search.own:
            self._own.setdefault(path.name, set()).add(os.path.realpath(path.parent))
        self._folders: list[str] = []
        self._links: list[str] = []
        self._folder(self._top, "", self.names)
        self._follow()

    def _follow(self) -> None:
        seen = {_identity(folder) for folder in self._folders} if self._links else set()
        while self._links:
            links, self._links = sorted(self._links), []
            for name in links:
                path = f"{self._top}/{name}"
                try:
                    status = os.stat(path)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                        raise DataError(f"cannot read {path}: {error.strerror}") from None
                    self._left_out.add("nowhere", f"{path} -> {os.readlink(path)}")
                    continue
                if stat.S_ISDIR(status.st_mode):
                    self._folder(path, f"{name}/", self.linked, seen)
                elif not stat.S_ISREG(status.st_mode):
                    self._left_out.add("special", path)
                else:
                    self._file(name, self.linked)

    def _folder(self, folder: str, prefix: str, found: list[str], seen: set[tuple[int, int]] | None = None) -> None:
        """seen: the folders that were looked at, where one may be met again."""
        if seen is None:
            self._folders.append(folder)
        elif (identity := _identity(folder)) in seen:
            self._left_out.add("same", folder)
            return
        else:
            seen.add(identity)
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except OSError as error:
            raise DataError(f"cannot read {folder}: {error.strerror}") from None
        names = {entry.name for entry in entries}
        if prefix and names >= {"config.yaml", "metrics.jsonl"}:
            self._left_out.add("own", f"{folder}/")
            return
        own, exclude = self._own_names(folder, names), self._exclude
        for entry in entries:
            last = entry.name
            if last in exclude:
                self._left_out.add("excluded", entry.path)
            elif last in own:
                self._left_out.add("own", entry.path)
            elif last[0] == "." and not self._is_asked_for(last):
                self._left_out.add("hidden", entry.path)
            elif entry.is_file(follow_symlinks=False):
                self._file(prefix + last, found)
            elif entry.is_dir(follow_symlinks=False):
                self._folder(entry.path, f"{prefix}{last}/", found, seen)
            elif entry.is_symlink():
                self._links.append(prefix + last)
            else:
                self._left_out.add("special", entry.path)

    def _file(self, name: str, found: list[str]) -> None:
        if self._matches(name):
            found.append(name)
        elif self._search.globs:
            self._left_out.unmatched += 1
        else:
            self._left_out.add_other(name)

    def _own_names(self, folder: str, names: set[str]) -> set[str]:
        """Which names in a folder are ours: shards and what belongs to them, tokenizers and their records."""
        own = {name for name in names & self._own.keys() if os.path.realpath(folder) in self._own[name]}
        if ".parts" in names or ("manifest.json" in names and _holds(f"{folder}/manifest.json", b'"tokenizer_sha256"')):
            own |= names & {".lock", ".parts", "manifest.json", "tokenizer.json"}
            own.update(filter(SHARD_NAME.fullmatch, names))
        for name in names:
            if name.endswith(".record.json") and _holds(f"{folder}/{name}", b'"asked_vocab_size"'):
                own |= {name, name.replace(".record.json", ".json")}
        return own


def _matcher(endings: Sequence[str] | None, globs: Sequence[str]) -> Callable[[str], object]:
    """Is a name, relative to the folder that is searched, one of those wanted?"""
    if not globs:
        if endings is None:
            return lambda name: True
        either = ["|".join(map(re.escape, some)) for some in (endings, COMPRESSIONS)]
        return re.compile(rf".*({either[0]})({either[1]})?", re.IGNORECASE | re.DOTALL).fullmatch
    for glob in globs:
        if not glob or glob.startswith("/") or ".." in glob.split("/"):
            raise ConfigError(f"--glob {glob!r} is not a pattern for names below a folder")
    plain = re.compile("|".join(fnmatch.translate(glob) for glob in globs if "/" not in glob) or r"(?!)")
    paths = [glob.split("/") for glob in globs if "/" in glob]
    if not paths:
        return lambda name: plain.match(name.rpartition("/")[2])
    return lambda name: (
        plain.match(name.rpartition("/")[2]) or any(_ends_with(name.split("/"), pattern) for pattern in paths)
    )


def _ends_with(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Do the last parts of a path fit the patterns? ``**`` stands for any number of them."""
    if not patterns:
        return True
    if patterns[-1] == "**":
        return any(_ends_with(parts[:count], patterns[:-1]) for count in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[-1], patterns[-1]) and _ends_with(parts[:-1], patterns[:-1])


def _matcher_of_hidden(globs: Sequence[str]) -> Callable[[str], object]:
    """Is a file or folder whose name begins with a dot meant by a pattern?"""
    asked = [part for glob in globs for part in glob.split("/") if part.startswith(".")]
    return re.compile("|".join(map(fnmatch.translate, asked)) or r"(?!)").match


def _holds(path: str, mark: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return mark in file.read(_HEAD)
    except OSError:
        return False


def _identity(path: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _input_file(path: Path, name: str, split: str | None) -> InputFile:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _no_file(path, _kind(status.st_mode))
        if not os.access(path, os.R_OK):
            raise PermissionError(13, "Permission denied")
        if status.st_size == 0 and _has_content(path):
            raise _no_file(path, "a file that does not tell its size, as those of /proc")
    except FileNotFoundError:
        if str(path) == "-":
            raise _no_file(path, "standard input") from None
        leads = f"is a link that leads nowhere ({os.readlink(path)})" if path.is_symlink() else "does not exist"
        raise DataError(f"input {path} {leads}") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return InputFile(path, name, status.st_size, status.st_mtime_ns, split)


def _has_content(path: Path) -> bool:
    with open(path, "rb") as file:
        return bool(file.read(1))


def _kind(mode: int) -> str:
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _no_file(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"input {path} is {what}; input is read more than once, and by every rank: write it to a file first and name "
        f"that ({', '.join(COMPRESSIONS)} are read as they are)"
    )
