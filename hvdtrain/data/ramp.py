"""A batch that grows within a run: which step takes how many rows? Pure arithmetic on the rows consumed.

    rows of a step
    full |               __________      from ``start`` by ``increment`` up to ``full``; every size holds for an equal
         |          ____|                share of the first ``rows`` rows, until the step that reaches its end
         |     ____|
   start |____|
         +--------------|----------> rows consumed
                       rows

The size of a step depends on the row that it begins with, and on nothing else: a resumed run, on any number of ranks,
goes on where it was. Source: Megatron-LM's ``--rampup-batch-size start increment samples``.
"""

from dataclasses import dataclass

from hvdtrain.errors import ConfigError


@dataclass(frozen=True)
class Ramp:
    """Errors: ConfigError where ``full`` is not reached in whole increments, in as many rows as there are sizes."""

    start: int
    increment: int
    rows: int
    full: int

    def __post_init__(self) -> None:
        if not 0 < self.start < self.full:
            raise ConfigError(
                f"train.ramp_start={self.start} must be below the batch of {self.full} sequences; "
                "set it to 0 for no ramp"
            )
        if self.increment < 1 or (self.full - self.start) % self.increment:
            raise ConfigError(
                f"train.ramp_increment={self.increment} does not lead from train.ramp_start={self.start} to the batch "
                f"of {self.full} sequences: it has to divide {self.full - self.start}"
            )
        if self.rows < self.sizes:
            raise ConfigError(
                f"train.ramp_tokens is {self.rows} sequences, fewer than the ramp has sizes ({self.sizes})"
            )

    @property
    def sizes(self) -> int:
        """How many sizes there are below the full one."""
        return (self.full - self.start) // self.increment

    def size_at(self, row: int) -> int:
        """Rows of the step that begins with row number ``row``."""
        return self.full if row >= self.rows else self.start + self._place(row) * self.increment

    def steps_alike(self, row: int, most: int) -> int:
        """How many steps from row ``row`` on, of ``most`` at most, have the size of the first."""
        if row >= self.rows:
            return most
        return min(most, self._steps_in_place(row))

    def steps_to(self, row: int) -> int:
        """Steps that it takes to consume ``row`` rows or more, from the beginning."""
        at, steps = 0, 0
        while at < row:
            if at >= self.rows:
                return steps + -(-(row - at) // self.full)
            size = self.size_at(at)
            taken = min(self._steps_in_place(at), -(-(row - at) // size))
            at, steps = at + taken * size, steps + taken
        return steps

    def _place(self, row: int) -> int:
        return row * self.sizes // self.rows

    def _steps_in_place(self, row: int) -> int:
        end = -(-(self._place(row) + 1) * self.rows // self.sizes)  # the first row of the next size
        return -(-(end - row) // self.size_at(row))
