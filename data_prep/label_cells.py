"""What a cell says of a text's labels: one, or several with something between them; by name, or by number."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.finding import Search
from hvdtrain.data.cleaning import BadItem
from hvdtrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class LabelCells:
    """separator: between the labels of a text; empty: it has one. names: all labels, in the order of their numbers,
    and a cell may give a number instead; none: those that training has, as they are written.
    """

    separator: str = ""
    names: tuple[str, ...] = ()

    def identity(self) -> dict[str, Any]:
        """What was asked for; nothing of what was not, so that shards of before there was a choice are known again."""
        separator = {"label_separator": self.separator} if self.separator else {}
        return separator | ({"given_label_names": list(self.names)} if self.names else {})

    @lru_cache(maxsize=1 << 16)  # noqa: B019  # there is one for each preparation
    def read(self, cell: bytes) -> tuple[str, ...]:
        """The labels of a cell, each as often as it is said. Errors: BadItem, whose message begins with the verb."""
        text = cell.decode()
        parts = [part.strip() for part in text.split(self.separator)] if self.separator else [text]
        if not all(parts):
            raise BadItem("label", f"has an empty label in {text!r}")
        return tuple([self._named(part) for part in parts] if self.names else parts)

    def _named(self, part: str) -> str:
        if part in self.names:
            return part
        if part.isdecimal() and int(part) < len(self.names):
            return self.names[int(part)]
        raise BadItem(
            "unnamed",
            f"has the label {part!r}, which is neither one of the {len(self.names)} names of --label-names nor their "
            f"number, 0 to {len(self.names) - 1}",
        )


ONE_LABEL = LabelCells()


def read_label_names(path: Path | None) -> tuple[str, ...]:
    """A name a line, of a file that may be compressed. Errors: DataError; ConfigError where two are equal."""
    if path is None:
        return ()
    if path.is_dir():
        raise ConfigError(f"--label-names {path} is a folder; it must be a file with a name a line")
    (file,) = Search().files([path])
    try:
        lines = file.read_all().decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from None
    names = tuple(line.strip() for line in lines)
    _refuse(path, names)
    return names


def _refuse(path: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        if not name:
            raise ConfigError(f"--label-names {path}: line {number + 1} is empty; each line names a label")
        if (first := names.index(name)) < number:
            raise ConfigError(f"--label-names {path}: lines {first + 1} and {number + 1} are both {name!r}")
