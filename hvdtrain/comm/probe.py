"""Does a launcher join its ranks over this environment's MPI? A job script asks, with two ranks, before it trains.

    srun --mpi=pmix --ntasks=2 python -m hvdtrain.comm.probe

It does without torch and Horovod, which would take longer to load than all the rest. The answer holds for Horovod too,
which is built on the MPI that mpi4py loads.
"""

import sys

from hvdtrain.comm.session import open_ranks
from hvdtrain.comm.world import detect_world
from hvdtrain.errors import HvdtrainError, LaunchError, say


def main() -> int:
    try:
        print(probe(), flush=True)
    except HvdtrainError as error:
        say(str(error))
        return error.exit_code
    return 0


def probe() -> str:
    """Meet the other ranks, and leave again (collective); what to say about it.

    Errors: LaunchError where a rank is alone, or sees others than the launcher started.
    """
    world = detect_world()
    if world.size == 1:
        raise LaunchError(f"this process is alone ({world.launcher})")
    with open_ranks(world) as ranks:
        if ranks.all_gather_object(world.rank) != list(range(world.size)):
            raise LaunchError(f"{world.launcher} and MPI number the ranks in different ways")
    return f"{world.size} ranks joined ({world.launcher})"


if __name__ == "__main__":
    sys.exit(main())
