"""How much processor time may this process have? Control groups limit it, also where every core may be used.

    /sys/fs/cgroup            no limit
      pod                     6 CPUs      cpu.max: 600000 100000                           (version 2)
        container             2 CPUs      cpu.cfs_quota_us: 200000, cpu.cfs_period_us: 100000      (1)

A process is in its own group and in all those above it; each limits all that are in it together. Threads beyond the
limit do not run faster: the kernel stops them all for the rest of each period, in the middle of a collective or of an
all-reduce, on every rank at another moment.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Limit(NamedTuple):
    """``group`` may use ``cpus`` CPUs. Two processes of a machine that see the same group share them."""

    group: tuple[int, int]
    cpus: float


class Quota(NamedTuple):
    """``cpus`` for ``ranks`` ranks together."""

    cpus: float
    ranks: int

    @property
    def of_rank(self) -> float:
        return self.cpus / self.ranks

    def __str__(self) -> str:
        return f"a CPU quota of {self.cpus:g}" + (f" for {self.ranks} ranks" if self.ranks > 1 else "")


def read_limits(machine: Path = Path("/")) -> tuple[Limit, ...]:
    """Every limit on this process, from its own group upwards. Empty where there is none, or Linux does not say."""
    try:
        groups = [line.split(":", 2) for line in (machine / "proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split(" ") for line in (machine / "proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return ()
    found = []
    for version, root, mount in _hierarchies(mounts):
        for _, controllers, path in groups:
            if (controllers == "") if version == 2 else "cpu" in controllers.split(","):
                found += [_limit(folder, version) for folder in _upwards(path, root, machine / mount.lstrip("/"))]
    return tuple(limit for limit in found if limit is not None)


def quota_of_rank(mine: Sequence[Limit], of_node: Sequence[Sequence[Limit]]) -> Quota | None:
    """The limit that leaves a rank the least; ``of_node``: the limits on each rank of the node, this one included."""
    quotas = [Quota(limit.cpus, sum(limit in theirs for theirs in of_node)) for limit in mine]
    return min(quotas, key=lambda quota: quota.of_rank, default=None)


def _hierarchies(mounts: list[list[str]]) -> Iterator[tuple[int, str, str]]:
    """Version, root and mount point of all that may limit CPUs."""
    for fields in mounts:
        kind, *_, options = fields[fields.index("-") + 1 :]
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            root, mount = (re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), text) for text in fields[3:5])
            yield 2 if kind == "cgroup2" else 1, root, mount


def _upwards(path: str, root: str, mount: Path) -> Iterator[Path]:
    """The folder of group ``path`` and those above, as far as they are visible; ``root`` of the groups is ``mount``."""
    group = PurePosixPath(path)
    folder = mount / group.relative_to(root) if group.is_relative_to(root) else mount
    yield from (folder, *(above for above in folder.parents if above.is_relative_to(mount)))


def _limit(folder: Path, version: int) -> Limit | None:
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if quota in ("max", "-1"):
            return None
        # Not its path: in a container every group calls itself /.
        return Limit((version, folder.stat().st_ino), int(quota) / int(period))
    except (OSError, ValueError):
        return None
