"""A slow network on one machine: two namespaces, and a cable between them that `tc` limits (needs root)."""

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PLACES = ("hvwire0", "hvwire1")  # namespaces, and the names of the cable's ends
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@contextmanager
def slow_link(folder: Path) -> Iterator[list[str]]:
    """Two network namespaces and 1 Gbit/s between them; yields mpirun's words that put a rank into each."""
    agent = folder / "agent"
    agent.write_text(  # what mpirun calls instead of ssh: HOST COMMAND...
        f'#!/bin/sh\nplace={PLACES[0][:-1]}$((${{1##*.}} - 1)); shift\nexec ip netns exec "$place" sh -c "$*"\n'
    )
    agent.chmod(0o755)
    commands = [
        *(f"ip netns add {place}" for place in PLACES),
        f"ip link add {PLACES[0]} netns {PLACES[0]} type veth peer name {PLACES[1]} netns {PLACES[1]}",
    ]
    for number, place in enumerate(PLACES):
        commands += [
            f"ip -n {place} addr add {ADDRESSES[number]}/24 dev {place}",
            f"ip -n {place} link set {place} up",
            f"ip -n {place} link set lo up",
            f"ip netns exec {place} tc qdisc add dev {place} root tbf rate 1gbit burst 256kb latency 50ms",
        ]
    _remove_places()  # those of a run that was killed
    try:
        for command in commands:
            subprocess.run(shlex.split(command), check=True)
        link = "10.77.0.0/24"
        yield [
            *("ip", "netns", "exec", PLACES[0], "mpirun", "--host", ",".join(f"{address}:1" for address in ADDRESSES)),
            *("--mca", "plm_rsh_agent", str(agent), "--mca", "oob_tcp_if_include", link),
            *("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", link),
        ]
    finally:
        _remove_places()


def _remove_places() -> None:
    for place in PLACES:
        subprocess.run(["ip", "netns", "del", place], check=False, stderr=subprocess.DEVNULL)
