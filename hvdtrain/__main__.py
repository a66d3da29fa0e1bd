"""``python -m hvdtrain`` and the console command ``hvdtrain``: run a command, turn errors into exit codes."""

import atexit
import gc
import os
import sys
import traceback

from hvdtrain import cli
from hvdtrain.comm.terminal import take_terminal, write_whole_lines
from hvdtrain.comm.world import World, detect_world
from hvdtrain.errors import (
    EXIT_INTERRUPTED,
    EXIT_IO,
    HvdtrainError,
    LaunchError,
    crash_code,
    describe_crash,
    give_up_output,
    is_out_of_memory,
    let_rank_0_speak,
    report,
    say,
    say_from,
)
from hvdtrain.machine.circles import look_seldom
from hvdtrain.machine.cores import set_library_threads


def main(argv: list[str] | None = None) -> int:
    world = World()
    if argv is None:  # a process of its own
        look_seldom()
    atexit.register(gc.freeze)  # or Python looks for circles in all that torch has loaded: .4 s of a processor
    set_library_threads(os.environ)  # torch and numpy are loaded by the commands, below
    words = sys.argv[1:] if argv is None else argv
    try:
        try:
            world = detect_world()
        except LaunchError:
            if cli.works_on_ranks(words):
                raise
        write_whole_lines(world)
        take_terminal(world)
        return cli.run(words, world)
    except HvdtrainError as error:
        report(error, world.is_main)
        if not error.on_all_ranks and (world.size > 1 or isinstance(error, LaunchError)):
            let_rank_0_speak()
        return error.exit_code
    except KeyboardInterrupt:
        print("hvdtrain: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left
        give_up_output()
        return EXIT_IO
    except Exception as error:
        if not is_out_of_memory(error):
            traceback.print_exc()
        if is_out_of_memory(error) or world.size > 1:
            words = describe_crash(error)
            say_from(world.rank, words) if world.size > 1 else say(words)
        return crash_code(error)


if __name__ == "__main__":
    sys.exit(main())
