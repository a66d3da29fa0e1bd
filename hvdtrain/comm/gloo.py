"""Check what Gloo needs of a machine before Horovod starts it. Where it is missing, Gloo crashes or waits for ever.

HOROVOD_GLOO_IFACE      the network interface over which ranks meet first
the machine's name      all sockets after that use its address, because Horovod 0.28.1 does not pass the interface on;
                        Gloo does not check that the name has an address
"""

import ipaddress
import os
import socket
from collections.abc import Mapping

from hvdtrain.comm.world import World
from hvdtrain.errors import LaunchError, describe, say_from


def check_own_address(world: World, env: Mapping[str, str] | None = None) -> None:
    """Will the other ranks find this one? (local)

    Errors: LaunchError where they will not. The first rank of each machine says so.
    """
    trouble = _trouble(os.environ if env is None else env)
    if trouble:
        error = LaunchError(f"{trouble}; or start over MPI (mpirun, srun --mpi=pmix)")
        if world.local_rank == 0 and not world.is_main:  # rank 0 says it of its own
            say_from(world.rank, describe(error))
        raise error


def _trouble(env: Mapping[str, str]) -> str | None:
    """What is wrong, and the cure; None: nothing."""
    import psutil  # Horovod needs it too

    name, interface, seen_elsewhere = socket.gethostname(), env.get("HOROVOD_GLOO_IFACE", ""), False
    if interface:
        cards = {card: {part.family: part.address for part in parts} for card, parts in psutil.net_if_addrs().items()}
        own = [cards.get(interface, {}).get(family) for family in (socket.AF_INET, socket.AF_INET6)]
        if not any(own):
            return (
                f"HOROVOD_GLOO_IFACE={interface} has no address on {name}: set it to one of {', '.join(sorted(cards))}"
            )
        seen_elsewhere = not any(_is_loopback(address) for address in own if address)
    try:
        address = _address_of(name)
    except OSError as error:
        return (
            f"this machine's name, {name}, has no address ({error.strerror or error}), which Gloo uses: "
            "write one into its /etc/hosts, or into DNS"
        )
    if seen_elsewhere and int(env.get("HOROVOD_CROSS_SIZE", "1")) > 1 and _is_loopback(address):
        return (
            f"the address of this machine's name, {name}, is {address}, at which Gloo's ranks on other machines do not "
            f"find it: write that of {interface} into its /etc/hosts, or into DNS"
        )
    return None


def _address_of(name: str) -> str:
    """The one that Gloo takes: the first to which a socket can be bound. Errors: OSError."""
    trouble = OSError("none of its own")
    for family, kind, protocol, _, address in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
            return str(address[0])
        except OSError as error:
            trouble = error
    raise trouble


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
