"""Decide which nodes are bad, from what every node saw. Nothing here depends on the rank: all decide alike.

    node             n1       n1         n2         n3
    environment      torch A    torch A    torch B     n3 is bad: most have another
    shards           ok         missing    ok          n2 is bad
    run folder       full       full       full        no node is to blame: the job cannot run, with a code of its own

The job's exit code is that of the look (65, 74 or 2) where all nodes have its problem, and 70 where a node is bad.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from hvdtrain.errors import EXIT_CRASH

_ROWS_OF_A_CHECK = 8  # more healthy nodes than that share a row


@dataclass(frozen=True)
class Look:
    """What one node saw in one check.

    problem: why the node is bad, by itself; empty: it is not. note: worth a word, but no reason to stay away.
    must_agree: what must be the same on all nodes. amount: orders the looks of one check, where ``found`` is a number.
    exit_code: the job's, where all nodes have a problem here; 70: then each of them is bad.
    """

    check: str
    found: str
    problem: str = ""
    note: str = ""
    must_agree: Mapping[str, str] = field(default_factory=dict)
    amount: float = 0.0
    exit_code: int = EXIT_CRASH


@dataclass(frozen=True)
class Finding:
    """``verdict``: ok, or note or BAD and why."""

    node: str
    check: str
    found: str
    verdict: str
    amount: float = 0.0

    @property
    def is_bad(self) -> bool:
        return self.verdict.startswith("BAD")


@dataclass(frozen=True)
class Verdict:
    """``bad_nodes``: in the order of the ranks. ``exit_code``: 0 where all is well, else ``message`` says what is not.

    Where all nodes have the same problem, none is named for it.
    """

    findings: tuple[Finding, ...]
    bad_nodes: tuple[str, ...]
    exit_code: int
    message: str


def judge(looks: Mapping[str, Sequence[Look]]) -> Verdict:
    """looks: node -> what it saw. Where as many nodes hold one value as another, the first node's is right."""
    by_check: dict[str, dict[str, Look]] = {}
    for node, seen in looks.items():
        for look in seen:
            by_check.setdefault(look.check, {})[node] = look
    findings, blamed, of_the_job = [], set(), []
    for check, of_node in by_check.items():
        common = most_common([look.must_agree for look in of_node.values() if not look.problem])
        for node, look in of_node.items():
            why = look.problem or differences(look.must_agree, common)
            verdict = f"BAD: {why}" if why else f"note: {look.note}" if look.note else "ok"
            findings.append(Finding(node, check, look.found, verdict, look.amount))
        bad = [finding for finding in findings if finding.check == check and finding.is_bad]
        codes = {look.exit_code for look in of_node.values() if look.problem}
        if len(bad) == len(looks) and EXIT_CRASH not in codes:
            of_the_job.append((f"{check}: {of_node[bad[0].node].problem}", min(codes)))
        else:
            blamed.update(finding.node for finding in bad)
    bad_nodes = tuple(node for node in looks if node in blamed)
    if of_the_job:
        message, exit_code = of_the_job[0]
        every = "on every node: " if len(looks) > 1 else ""
        return Verdict(tuple(findings), bad_nodes, exit_code, f"preflight: {every}{message}")
    if bad_nodes:
        return Verdict(tuple(findings), bad_nodes, EXIT_CRASH, f"preflight: bad nodes: {', '.join(bad_nodes)}")
    return Verdict(tuple(findings), (), 0, "")


def most_common(held: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """For each key the value that most nodes have; of two that are as frequent, the one that came first."""
    counts: dict[str, Counter[str]] = {}
    for values in held:
        for key, value in values.items():
            counts.setdefault(key, Counter())[value] += 1
    return {key: count.most_common(1)[0][0] for key, count in counts.items()}


def differences(mine: Mapping[str, str], common: Mapping[str, str]) -> str:
    """Where ``mine`` differs from what most others have, in words; empty: nowhere."""
    return "; ".join(f"{key} {value}, elsewhere {common[key]}" for key, value in mine.items() if value != common[key])


def slow(speeds: Sequence[float], factor: float) -> list[int]:
    """Which of ``speeds`` are below the median divided by ``factor``."""
    limit = median(speeds) / factor
    return [at for at, speed in enumerate(speeds) if speed < limit]


def table(findings: Sequence[Finding]) -> str:
    """Node, check, found, verdict. Where many nodes are healthy, those of one check share a row."""
    rows = [("node", "check", "found", "verdict")]
    for check in dict.fromkeys(finding.check for finding in findings):
        mine = [finding for finding in findings if finding.check == check]
        healthy = [finding for finding in mine if finding.verdict == "ok"]
        if len(healthy) > _ROWS_OF_A_CHECK:
            first, *_, last = sorted(healthy, key=lambda finding: finding.amount)
            texts = {finding.found for finding in healthy}
            found = first.found if len(texts) == 1 else f"{first.found} ... {last.found}"
            rows.append((f"{len(healthy)} nodes", check, found, "ok"))
            mine = [finding for finding in mine if finding.verdict != "ok"]
        rows += [(finding.node, check, finding.found, finding.verdict) for finding in mine]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    )


def resubmit_without(bad_nodes: Sequence[str], excluded: str = "") -> list[str]:
    """The words that submit a batch script again, but not to ``bad_nodes``: ``sbatch --exclude=n2,n5``.

    excluded: a list of nodes that the job stays away from already, as Slurm writes it (``n[7-9]``).
    """
    names = [*([excluded] if excluded else []), *bad_nodes]
    return ["sbatch", *([f"--exclude={','.join(names)}"] if names else [])]
