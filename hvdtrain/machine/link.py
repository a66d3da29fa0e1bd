"""A slow network on one machine: ranks on hosts of their own, whose cables ``tc`` limits (as root; see hosts.py).

hub --- tbf --- n1   rank 0, and mpirun
 |----- tbf --- n2   rank 1
 `----- tbf --- n3   rank 2         both ends of each cable have the rate; a host also waits for the latency
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.machine.hosts import Network

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_LEAST_BITS_PER_S = 64e3  # below that a connection does not even begin in time
_MOST_LATENCY_S = 10.0


@dataclass(frozen=True)
class Link:
    """Of each host to the switch. bits_per_s: each way; latency_s: of a packet from a host to another."""

    bits_per_s: float
    latency_s: float = 0.0


@contextmanager
def slow_link(
    names: Sequence[str], link: Link, folder: Path, shared: Sequence[Path] = ()
) -> Iterator[tuple[Network, list[str]]]:
    """Hosts of these names with that link, and mpirun's words that put a rank on each; see ``Network``."""
    with Network(names, folder, shared) as network:
        for name in names:
            network.limit(name, link.bits_per_s, link.latency_s)
        agent = folder.resolve() / "agent"  # what mpirun calls instead of ssh: HOST COMMAND...
        cases = "\n".join(f'{name}) set -- {" ".join(network.hosts[name].enter())} sh -c "$*" ;;' for name in names)
        agent.write_text(f'#!/bin/sh\nhost=$1; shift\ncase $host in\n{cases}\nesac\nexec "$@"\n')
        agent.chmod(0o755)
        yield (
            network,
            [
                *(*network.hosts[names[0]].enter(Path.cwd()), "mpirun", "--host", ",".join(f"{n}:1" for n in names)),
                *("--mca", "plm_rsh_agent", str(agent), "--mca", "oob_tcp_if_include", "eth0"),
                *("--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "eth0"),
            ],
        )


def parse_bandwidth(text: str, option: str) -> float:
    """``100mbit``, ``2.5gbit`` in bits a second. Errors: ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)bit(?:/s)?", text.strip(), re.IGNORECASE)
    bits_per_s = float(found[1]) * _PREFIXES[found[2].lower()] if found else 0.0
    if bits_per_s < _LEAST_BITS_PER_S:
        few = f" of {_LEAST_BITS_PER_S / 1e3:g}kbit or more" if found else ""
        raise ConfigError(f"{option} {text}: expected a bandwidth{few} like 1gbit or 100mbit (bits a second)")
    return bits_per_s


def parse_latency(text: str, option: str) -> float:
    """``1ms``, ``50us`` in seconds; ``0`` is none. Errors: ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", "0s" if text.strip() == "0" else text.strip(), re.IGNORECASE)
    seconds = float(found[1]) * _SECONDS[found[2].lower()] if found else -1.0
    if not 0 <= seconds <= _MOST_LATENCY_S:
        raise ConfigError(f"{option} {text}: expected a time like 1ms, 50us or 0, at most {_MOST_LATENCY_S:g}s")
    return seconds


def show_bandwidth(bits_per_s: float) -> str:
    """``100 Mbit/s``."""
    for name, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if bits_per_s >= factor:
            return f"{bits_per_s / factor:.4g} {name}bit/s"
    return f"{bits_per_s / 1e3:.4g} kbit/s"
