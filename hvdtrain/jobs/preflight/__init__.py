"""The first step of a job: are its nodes fit to train? Started by the job's launcher, with one rank a node or with all.

    every rank    its own GPUs                          \\
    first rank    environment, shards, disks             |--- all-gather ---> every rank judges alike,
      of a node   a file in the run folder               |                    rank 0 prints the table
    together      barriers (clocks), products, copies,   |
                  all-reduce, sums between nodes        /

A node that differs from most others, or is broken by itself, is bad: it is named, and the job ends with 70. What all
nodes have in common is no node's fault and ends the job with a code of its own: 65 (shards), 74 (run folder), 2 (more
ranks than GPUs). Each look at a disk or a driver has a time limit. For a node that hangs elsewhere, or never comes, the
job script has a limit for the whole step (``timeout --kill-after=10 180 srun ...``).
"""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hvdtrain.comm.group import Group
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import World, node_name
from hvdtrain.errors import ConfigError, RankError, plural
from hvdtrain.files import write_json
from hvdtrain.jobs.preflight.clock import look_at_clocks, meet
from hvdtrain.jobs.preflight.findings import Look, Verdict, judge, resubmit_without, table
from hvdtrain.jobs.preflight.latency import measure_latency
from hvdtrain.jobs.preflight.node import Gpus, look_around, look_at_gpus, safely, see_gpus, within
from hvdtrain.jobs.preflight.shared_folder import look_at_run_folder
from hvdtrain.jobs.preflight.speed import measure_speeds

MAX_CLOCK_SKEW_S = 1.0
SLOW_FACTOR = 2.0


def slow_factor_of(env: Mapping[str, str]) -> float:
    """HVDTRAIN_SLOW_FACTOR, for a site's own machines, or the default. Errors: ConfigError."""
    text = env.get("HVDTRAIN_SLOW_FACTOR") or str(SLOW_FACTOR)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"HVDTRAIN_SLOW_FACTOR={text!r} is no number") from None


@dataclass(frozen=True)
class Inspection:
    """What is looked at, and from where on it is bad. Errors: ConfigError.

    ranks_per_node: of the training, where the preflight has fewer; None: those that are here.
    slow_factor: a rank that is slower than the median by more than this is bad.
    """

    run_dir: Path | None = None
    data: Sequence[Path] = ()
    stage: Path | None = None
    max_clock_skew_s: float = MAX_CLOCK_SKEW_S
    slow_factor: float = SLOW_FACTOR
    ranks_per_node: int | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        if not self.slow_factor > 1:
            raise ConfigError(f"--slow-factor {self.slow_factor:g}: it must be above 1, or every second rank is slow")
        if not self.max_clock_skew_s > 0:
            raise ConfigError(f"--max-clock-skew {self.max_clock_skew_s:g}: it must be above 0")
        if self.stage is not None and not self.data:
            raise ConfigError("--stage needs --data: the shards that will be copied there")


def preflight(inspection: Inspection, world: World) -> None:
    """Look at all nodes of the job and print what was found (every rank calls this).

    Errors: RankError, on all ranks, where a node is bad (exit code 70) or the job cannot run on any.
    """
    started = time.monotonic()
    with open_group(world) as group:
        verdict = examine(inspection, group)
        seconds = time.monotonic() - started
        nodes = len({finding.node for finding in verdict.findings})
        if group.rank == 0:
            print(table(verdict.findings), flush=True)
            if not verdict.exit_code:
                print(f"hvdtrain: preflight: {_healthy(nodes)} ({seconds:.1f} s)", flush=True)
        if inspection.json is not None:
            group.on_main(lambda: write_json(inspection.json, _as_json(verdict, seconds)))
        if verdict.exit_code:
            raise RankError(verdict.message, verdict.exit_code)


def examine(inspection: Inspection, group: Group) -> Verdict:
    """Look at all nodes and judge them; the same verdict on all ranks (collective)."""
    group.agree(inspection, "what the preflight is told")
    node = node_name()
    nodes = group.all_gather_object(node)
    first = {name: nodes.index(name) for name in nodes}
    is_first = first[node] == group.rank
    looks: dict[str, list[Look]] = {name: [] for name in first}

    shared = look_at_run_folder(inspection.run_dir, node, is_first, group) if inspection.run_dir is not None else {}
    local = look_around(inspection.run_dir, inspection.data, inspection.stage) if is_first else []
    seen = group.all_gather_object((local, _gpus()))
    for name, rank in first.items():
        looks[name] += [*seen[rank][0], *([shared[name]] if shared else [])]
        ranks = inspection.ranks_per_node or (nodes.count(name) if nodes.count(name) > 1 else None)
        here = [gpus for owner, (_, gpus) in zip(nodes, seen, strict=True) if owner == name]
        looks[name].append(safely("GPUs", lambda here=here, ranks=ranks: look_at_gpus(here, ranks)))
    if len(first) > 1:
        rounds = meet(group)
        clocks = look_at_clocks([rounds[rank] for rank in first.values()], inspection.max_clock_skew_s)
        for name, clock in zip(first, clocks, strict=True):
            looks[name].append(clock)
    for name, speeds in measure_speeds(node, inspection.slow_factor, group).items():
        looks[name] += speeds
    for name, look in measure_latency(nodes, group).items():
        looks[name].append(look)
    return judge(looks)


def _gpus() -> Gpus:
    try:
        return within(see_gpus)
    except Exception as error:  # of a driver that does not answer, or of torch
        return Gpus(driver_problem=f"{type(error).__name__}: {error}")


def _healthy(nodes: int) -> str:
    said = f"{plural(nodes, 'node')} healthy"
    there = os.environ.get("SLURM_JOB_NUM_NODES", "")
    return said if not there.isdecimal() or int(there) == nodes else f"{said}, of {there} that the job has"


def _as_json(verdict: Verdict, seconds: float) -> dict[str, Any]:
    excluded = os.environ.get("HVDTRAIN_EXCLUDED", "")
    return {
        "exit_code": verdict.exit_code,
        "message": verdict.message,
        "bad_nodes": list(verdict.bad_nodes),
        "resubmit": resubmit_without(verdict.bad_nodes, excluded),
        "seconds": round(seconds, 1),
        "findings": [asdict(finding) for finding in verdict.findings],
    }
