"""A slow network on one machine: two hosts, and cables that `tc` limits (needs root)."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from hosts import Network  # noqa: E402

NAMES = ("n1", "n2")


@contextmanager
def slow_link(folder: Path) -> Iterator[tuple[Network, list[str]]]:
    """Two hosts and 1 Gbit/s between them, and mpirun's words that put a rank on each."""
    with Network(NAMES, folder) as network:
        first, *_ = (network.hosts[name] for name in NAMES)
        for name in NAMES:
            network.limit(name, "1gbit")
        agent = folder / "agent"  # what mpirun calls instead of ssh: HOST COMMAND...
        cases = "\n".join(f'{name}) set -- {" ".join(network.hosts[name].enter())} sh -c "$*" ;;' for name in NAMES)
        agent.write_text(f'#!/bin/sh\nhost=$1; shift\ncase $host in\n{cases}\nesac\nexec "$@"\n')
        agent.chmod(0o755)
        yield (
            network,
            [
                *(*first.enter(Path.cwd()), "mpirun", "--host", ",".join(f"{name}:1" for name in NAMES)),
                *("--mca", "plm_rsh_agent", str(agent), "--mca", "oob_tcp_if_include", "eth0"),
                *("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0"),
            ],
        )
