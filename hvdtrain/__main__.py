"""``python -m hvdtrain`` and the console command ``hvdtrain``: run a command, turn errors into exit codes."""

import sys

from hvdtrain import cli
from hvdtrain.comm.world import World, detect_world
from hvdtrain.errors import EXIT_INTERRUPTED, HvdtrainError, report


def main(argv: list[str] | None = None) -> int:
    world = World()
    try:
        world = detect_world()
        return cli.run(sys.argv[1:] if argv is None else argv, world)
    except HvdtrainError as error:
        report(error, world.is_main)
        return error.exit_code
    except KeyboardInterrupt:
        print("hvdtrain: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
