"""``python -m hvdtrain`` and the console command ``hvdtrain``: run a command, turn errors into exit codes."""

import os
import sys
import traceback

from hvdtrain import cli
from hvdtrain.comm.world import World, detect_world
from hvdtrain.errors import EXIT_CRASH, EXIT_INTERRUPTED, EXIT_IO, HvdtrainError, report


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
    except BrokenPipeError:  # whoever read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its exit
        return EXIT_IO
    except Exception:
        traceback.print_exc()
        return EXIT_CRASH


if __name__ == "__main__":
    sys.exit(main())
