"""What a training process of an elastic run does besides training: it takes its place among the others, ends with its
worker (elastic.py), and tells it why it stopped.

    worker  |-- starts it, with MARK in its environment --|     |-- reads what was told, and its exit code --|
    rank       enter: who trains with whom? -- an ordinary run -- tell_stopped
"""

import json
import math
import os
import signal
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hvdtrain.comm.ancestors import signal_at_parents_end
from hvdtrain.comm.world import World
from hvdtrain.errors import EXIT_CRASH, EXIT_OK, CheckpointError, ConfigError, describe, plural, say

if TYPE_CHECKING:
    from hvdtrain.config import RunConfig

MARK = "HVDTRAIN_ELASTIC_ROUND"  # in the environment of a training process
IDLE, AGAIN, LEAVE = "idle", "again", "leave"  # what it tells its worker


def in_round() -> bool:
    """Is this a worker's training process?"""
    return MARK in os.environ


def enter(recipe: str, overrides: Sequence[str], run_dir: Path | None, resume: str, world: World) -> World | None:
    """Begin a round in a training process. Returns its place among the ranks that take part; None: it is one too many,
    and shall end now.

    recipe ... resume: as ``train`` takes them. From here on the process ends when its worker does. Horovod's variables
    are set for the ranks that take part.
    Errors: ConfigError where the recipe is wrong, or makes the batch follow the number of ranks (scaling.per_rank).
    """
    from hvdtrain.config import load_config, run_folders

    mark = json.loads(os.environ[MARK])
    os.set_inheritable(mark["tell"], False)
    _end_with(mark["worker"])
    count = ranks_that_share(load_config(recipe, overrides, run_folders(recipe, run_dir, resume)), world.size)
    if world.rank >= count:
        say(f"elastic: rank {world.rank} waits: of {world.size} ranks {count} can share the batch evenly")
        tell(IDLE)
        return None
    return take_place(mark["hosts"][:count], world.rank, os.environ)


def ranks_that_share(config: "RunConfig", most: int, unit: int = 1) -> int:
    """The largest number of ranks, up to ``most``, a multiple of ``unit`` and in whole replicas, that can share every
    batch of the run evenly; the least, where there is none.

    Errors: ConfigError where the batch follows the number of ranks, or they are too few for a replica.
    """
    from hvdtrain.sizing import check_shareable

    if config.scaling.per_rank:
        raise ConfigError(
            "scaling.per_rank=true makes the batch of the ranks that there are, which here would change within the "
            "run; set scaling.per_rank=false and train.global_batch"
        )
    least = math.lcm(unit, config.mesh.ranks)
    if most < least:
        raise ConfigError(f"{plural(most, 'rank')} left, and mesh.* needs {least}; the run goes on with more")
    for count in range(most // least * least, least, -least):
        try:
            check_shareable(config, config.replicas_of(count))
            return count
        except ConfigError:
            continue
    return least


def take_place(hosts: Sequence[str], rank: int, env: MutableMapping[str, str]) -> World:
    """The world of ``rank``, where rank i is on ``hosts[i]``; ``env`` gets Horovod's variables for it."""
    here, local_rank = hosts[rank], hosts[:rank].count(hosts[rank])
    across = [host for host in dict.fromkeys(hosts) if hosts.count(host) > local_rank]  # that have such a local rank
    world = World(rank, len(hosts), local_rank, hosts.count(here), "horovodrun --gloo")
    places = {
        "RANK": world.rank,
        "SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_SIZE": world.local_size,
        "CROSS_RANK": across.index(here),
        "CROSS_SIZE": len(across),
    }
    env.update({f"HOROVOD_{name}": str(number) for name, number in places.items()})
    return world


def tell_stopped(reason: str, was_told_to_leave: bool) -> None:
    """Tell the worker whether a run that stopped early shall go on. It does so only after a signal that was not meant
    for this worker: another one's SIGTERM, or the USR2 by which workers are told of new hosts.

    reason: what all ranks agreed on, see stopping.py. was_told_to_leave: whether this very process has got a SIGTERM.
    """
    tell(AGAIN if reason.startswith("SIG") and not was_told_to_leave else LEAVE)


def tell(word: str) -> None:
    os.write(json.loads(os.environ[MARK])["tell"], word.encode())


def _end_with(worker: int) -> None:
    """Let the kernel end this process as soon as its worker has ended, however that ends (Linux)."""
    signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != worker:
        os._exit(EXIT_CRASH)


# --- the batch script -------------------------------------------------------------------------------------------------


def main(words: list[str]) -> int:
    """``python -m hvdtrain.jobs.elastic_rank RANKS_PER_NODE NODES RUN_DIR RECIPE [key=value ...]``

    For slurm/elastic.sbatch: prints how many of the nodes can share the batch evenly. Returns the exit code.
    """
    from hvdtrain.config import load_config

    try:
        per_node, nodes = int(words[0]), int(words[1])
        print(
            ranks_that_share(load_config(words[3], words[4:], [Path(words[2])]), per_node * nodes, per_node) // per_node
        )
    except (ConfigError, CheckpointError) as error:
        say(describe(error))
        return error.exit_code
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
