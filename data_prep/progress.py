"""How far is a preparation, over all ranks? A bar on a terminal, now and then a line in a log file. Rank 0 shows it.

The other ranks' progress is read from the records of finished units, so no rank waits for another.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep.pieces import Unit
from hvdtrain.comm.ranks import Ranks
from hvdtrain.errors import say
from hvdtrain.files import seen

_LOOK_EVERY_S = 1.0
_LINE_EVERY_S = 30.0
_SOON_S = 0.005


class ProgressBar:
    """Bytes of input done. ``advance`` within a unit, ``unit_done`` after it."""

    def __init__(self, units: Sequence[Unit], records: Path, ranks: Ranks):
        self._weights = {f"{unit.number:05d}.json": unit.weight for unit in units}
        self._names = list(self._weights)
        self._records, self._ranks = records, ranks
        self._total = sum(self._weights.values())
        self._finished: set[str] = set()
        self._in_unit = 0
        self._looked = self._said = self._started = time.monotonic()
        self._at_start = 0
        self._is_main = ranks.rank == 0

    def __enter__(self) -> "ProgressBar":
        self._at_start = self._look()
        hidden = not (self._is_main and sys.stderr.isatty())
        self._bar = tqdm(
            total=self._total, initial=self._at_start, unit="B", unit_scale=True, disable=hidden, desc="tokenising"
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, number: int, size: int) -> None:
        """``size`` more bytes of a unit's text. It may be more than was guessed, where it was compressed."""
        self._in_unit = min(self._in_unit + size, self._weights[self._names[number]])
        self._show()

    def unit_done(self, number: int) -> None:
        self._finished.add(self._names[number])
        self._in_unit = 0
        self._show()

    def wait_for_others(self) -> None:
        """Rank 0 goes on showing until every unit has its record. It looks less and less often: the end is noticed
        after a sixteenth of the wait, and not a second late where all the work took few.
        """
        began = time.monotonic()
        while self._is_main and self._ranks.size > 1 and len(self._finished) < len(self._names):
            time.sleep(min(_LOOK_EVERY_S, max(_SOON_S, (time.monotonic() - began) / 16)))
            self._show(look_now=True)

    def _look(self) -> int:
        """Finished bytes, by the records that are there."""
        if self._is_main:
            self._finished.update(
                name for name in self._names if name not in self._finished and seen(self._records / name)
            )
        return sum(self._weights[name] for name in self._finished)

    def _show(self, look_now: bool = False) -> None:
        now = time.monotonic()
        is_due = look_now or now - self._looked >= _LOOK_EVERY_S or len(self._finished) == len(self._names)
        if not self._is_main or not is_due:
            return
        self._looked = now
        done = min(self._total, self._look() + self._in_unit)
        self._bar.update(done - self._bar.n)
        if self._bar.disable and now - self._said >= _LINE_EVERY_S:
            self._said = now
            speed = (done - self._at_start) / (now - self._started)
            left = (self._total - done) / speed if speed else 0.0
            say(
                f"{100 * done / max(1, self._total):.0f} %: {done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, "
                f"{speed / 1e6:.1f} MB/s, {int(left // 60)}:{int(left % 60):02d} left"
            )
