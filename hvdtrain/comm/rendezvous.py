"""Gloo under plain ``srun``, where neither PMI nor mpirun can join the ranks (slurm/job.sh, launcher gloo).

    first node    batch script --- serve --- an address, for one step
                                     |
    every node    srun --- exec --- rank     puts its own address there, finds those of the others

Horovod's own server keeps the addresses; ranks learn who they are from Slurm's variables. Like that of ``horovodrun
--gloo``, the server answers whoever reaches its port: use it only within a cluster's network.
"""

import os
import signal
import socket
import sys
from collections.abc import Mapping, MutableMapping
from typing import NoReturn

from hvdtrain.comm.world import tasks_of_nodes
from hvdtrain.errors import EXIT_USAGE, LaunchError, say


def main(words: list[str]) -> int:
    """``serve [HOST]`` or ``exec WORDS...``; returns the exit code of a failure."""
    try:
        if words[:1] == ["serve"] and len(words) <= 2:
            serve(words[1] if len(words) == 2 else "127.0.0.1")
        if words[:1] == ["exec"] and len(words) > 1:
            run_in(os.environ, words[1:])
        raise LaunchError("usage: python -m hvdtrain.comm.rendezvous serve [HOST] | exec WORDS...")
    except LaunchError as error:
        say(str(error))
        return EXIT_USAGE


def serve(towards: str) -> NoReturn:
    """Print ``ADDRESS:PORT`` of a server that the machines around ``towards`` can reach; serve until SIGTERM.

    It never forgets an address. Horovod's own server does when all ranks have said goodbye, but it must then know them
    beforehand. So a server serves one step.
    """
    from horovod.runner.http.http_server import OK, RendezvousHandler, RendezvousServer

    class Keep(RendezvousHandler):
        def do_DELETE(self) -> None:
            self.send_status_code(OK)

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    address = address_towards(towards, os.environ.get("HOROVOD_GLOO_IFACE"))
    port = RendezvousServer().start(Keep)
    print(f"{address}:{port}", flush=True)
    while True:
        signal.pause()


def run_in(env: MutableMapping[str, str], words: list[str]) -> NoReturn:
    """Replace this process by the program ``words``, with ``env`` and a rank's variables. Errors: LaunchError."""
    env = {**env, **rank_environment(env)}
    try:
        os.execvpe(words[0], words, env)
    except OSError as error:
        raise LaunchError(f"cannot start {words[0]}: {error.strerror}") from None


def rank_environment(env: Mapping[str, str], interface: str | None = None) -> dict[str, str]:
    """What a task of a step of ``srun`` has to add to its environment, so that Horovod starts over Gloo.

    interface: network interface to the other ranks; default: HOROVOD_GLOO_IFACE, or the one on the way to the server.
    Errors: LaunchError where ``env`` is not that of a step, or HVDTRAIN_RENDEZVOUS is not ``HOST:PORT``.
    """
    host, _, port = env.get("HVDTRAIN_RENDEZVOUS", "").rpartition(":")
    if not host or not port.isdigit():
        raise LaunchError(f"HVDTRAIN_RENDEZVOUS={env.get('HVDTRAIN_RENDEZVOUS', '')!r}, expected HOST:PORT of a server")
    try:
        rank, size, local_rank, node = (
            int(env[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")
        )
        counts = tasks_of_nodes(env["SLURM_STEP_TASKS_PER_NODE"])
        local_size, name = counts[node], env["SLURMD_NODENAME"]
    except (KeyError, ValueError, IndexError) as error:
        raise LaunchError(f"this is no task of a Slurm step ({type(error).__name__}: {error}); use srun") from None
    interface = interface or env.get("HOROVOD_GLOO_IFACE") or interface_of(address_towards(host))
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": host,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": port,
        "HOROVOD_GLOO_IFACE": interface,
        "HOROVOD_HOSTNAME": name,
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(local_size),
        # Ranks of one local rank, across the nodes that have it.
        "HOROVOD_CROSS_RANK": str(sum(count > local_rank for count in counts[:node])),
        "HOROVOD_CROSS_SIZE": str(sum(count > local_rank for count in counts)),
    }


def address_towards(host: str, interface: str | None = None) -> str:
    """This machine's IPv4 address on the way to ``host``, or that of ``interface``. Nothing is sent.

    Errors: LaunchError where there is no such way or interface.
    """
    if interface is not None:
        found = [address for name, address in _addresses() if name == interface]
        if not found:
            names = sorted({name for name, _ in _addresses()})
            raise LaunchError(f"HOROVOD_GLOO_IFACE={interface} has no IPv4 address here; there are {', '.join(names)}")
        return found[0]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError as error:
        raise LaunchError(f"no way from {socket.gethostname()} to {host}: {error.strerror}") from None


def interface_of(address: str) -> str:
    """The network interface that has ``address``. Errors: LaunchError."""
    for name, theirs in _addresses():
        if theirs == address:
            return name
    raise LaunchError(f"no network interface of {socket.gethostname()} has {address}; name one in HOROVOD_GLOO_IFACE")


def _addresses() -> list[tuple[str, str]]:
    import psutil  # Horovod needs it too

    cards = psutil.net_if_addrs().items()
    return [(name, card.address) for name, parts in cards for card in parts if card.family == socket.AF_INET]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
