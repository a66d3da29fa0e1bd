"""Which nodes have stopped answering? The kernel knows it of this process's own TCP connections.

    this rank   data ---->  x       cable cut, node dead, switch off: nobody says so
                data again  x       after 0.2 s, 0.4, 0.8, ... and TCP itself gives up after a quarter of an hour

A rank that is only slow, stopped or stuck is not silent: its kernel goes on acknowledging. InfiniBand and the like have
time limits of their own, and no sockets.
"""

import os
import socket
import struct
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from ipaddress import ip_address

from hvdtrain.comm.ranks import Ranks

_UNANSWERED = 3  # times in a row that the kernel has sent the same again: over a second
# Of Linux's struct tcp_info: how often something was sent again, and a probe sent, in a row and without an answer.
_INFO = struct.Struct("2xBB")
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def other_hosts(ranks: Ranks) -> dict[str, str]:
    """Address -> name of every other host of the job (collective).

    An address that several hosts have is left out: Docker's bridge, for one, is 172.17.0.1 everywhere.
    """
    if ranks.size == 1:
        return {}
    here = socket.gethostname()
    hosts = dict(ranks.all_gather_object((here, own_addresses())))
    owners = Counter(address for addresses in hosts.values() for address in addresses)
    return {
        address: name
        for name, addresses in hosts.items()
        for address in addresses
        if name != here and owners[address] == 1
    }


def own_addresses() -> list[str]:
    """This host's IP addresses, without those that only it can reach."""
    import psutil  # Horovod needs it too

    cards = [card for parts in psutil.net_if_addrs().values() for card in parts if card.family in _FAMILIES]
    addresses = {_plain(card.address) for card in cards}
    return sorted(address for address in addresses if not ip_address(address).is_loopback)


class Silence:
    """Which host has not answered, and since when? ``hosts``: address -> name, of the other hosts of the job.

    Call ``look`` now and then while waiting for them, and ``forget`` once they have answered.
    """

    def __init__(self, hosts: Mapping[str, str]):
        self._hosts = dict(hosts)
        self._since: dict[tuple[int, str], float] = {}

    def look(self, now: float) -> dict[str, float]:
        """Each silent host, as ``name (address)``, and for how many seconds before ``now`` (of time.monotonic)."""
        unanswered = {(inode, peer) for inode, peer in _unanswered() if peer in self._hosts}
        self._since = {one: self._since.get(one, now) for one in unanswered}
        found: dict[str, float] = {}
        for (_, peer), since in self._since.items():
            name = f"{self._hosts[peer]} ({peer})"
            found[name] = max(found.get(name, 0.0), now - since)
        return found

    def forget(self) -> None:
        self._since.clear()


def _plain(address: str) -> str:
    """Without the interface behind an IPv6 address, and an IPv4 address within one as itself."""
    return address.partition("%")[0].removeprefix("::ffff:")


def _unanswered() -> list[tuple[int, str]]:
    """The inode and the other end's address of each connection that does not answer what was sent."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # it may have been closed meanwhile, or is no socket
            inode = os.stat(f"/proc/self/fd/{name}").st_ino
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family not in _FAMILIES or connection.type != socket.SOCK_STREAM:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
                if max(_INFO.unpack(info)) >= _UNANSWERED:
                    found.append((inode, _plain(connection.getpeername()[0])))
    return found
