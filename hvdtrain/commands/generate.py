"""What a trained run says to a text, or to each line of a file: a text that goes on, a translation, a label."""

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdtrain.checkpoint.reader import Weights
from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import World
from hvdtrain.commands.answering import Answering, TooLong, count_cut, open_answering, told
from hvdtrain.data.lines import LineReader
from hvdtrain.errors import ConfigError, OutputError, plural, say
from hvdtrain.files import make_folder, write
from hvdtrain.tasks import make_task
from hvdtrain.tasks.answers import Answer, Row
from hvdtrain.trained import find_run, open_mesh

_AT_ONCE = 4096  # answers that travel together


@dataclass(frozen=True)
class Lines:
    """A file to be answered line by line, and how.

    output: one line for each of ``input``, empty where that is, or was dropped. json: each is then a JSON object
    ``{"answers": [{"text": ..., "score": ...}, ...]}``, the best first; none for an empty line.
    field: of the text in JSON lines; none: the task's ``input_field``. invalid: see ``LineReader``.
    """

    input: Path
    output: Path
    field: str = ""
    json: bool = False
    too_long: TooLong = "refuse"
    invalid: str = "refuse"


def generate_file(
    run_dir: Path, lines: Lines, given: Mapping[str, Any], world: World, weights: Weights | None = None,
    which: str = "newest", mesh: MeshOptions | None = None,
) -> None:  # fmt: skip
    """Answer a file (collective): any launcher, any number of ranks, the same bytes.

    given: see ``Asked``. weights: see ``open_model``. which: see ``find_run``. mesh: see ``open_mesh``.
    Errors: on all ranks; ConfigError where ``output`` is there already.
    """
    with open_group(world, parts=True) as group:
        began_s = time.monotonic()
        group.on_main(lambda: _check(lines, given))
        run, reader, counts = find_run(run_dir, group, which), LineReader(lines.invalid), Counter[str]()
        field = lines.field or make_task(run.config.task).input_field
        texts = group.together(lambda: reader.texts(lines.input, field))
        group.agree(len(texts), f"the number of lines of {lines.input}")
        opened = open_answering(run, open_mesh(run, mesh, world, group), world, given, weights)
        rows = group.together(lambda: opened.rows(texts, lines.too_long, str(lines.input), counts))
        answers = gathered(opened.share(rows), group)
        broken = group.on_main(lambda: _write(lines, len(texts), answers, opened))
        if group.rank == 0:
            count_cut(answers, counts)
            mended = {
                **{what.replace("_", " "): n for what, n in reader.counts.items()},
                "line ends within answers, now spaces": broken or 0,
            }
            ran = f"in {time.monotonic() - began_s:.1f} s, {_about(opened)}"
            said = [f"{plural(len(rows), 'line', ',')} answered {ran}: {lines.output}", *told(counts, mended)]
            say("; ".join(said))


def generate(
    run_dir: Path, prompt: str, given: Mapping[str, Any], world: World, weights: Weights | None = None,
    which: str = "newest", as_json: bool = False, too_long: TooLong = "refuse", mesh: MeshOptions | None = None,
) -> str:  # fmt: skip
    """What a checkpoint of the run says to one text (collective): a line, or as JSON. See ``generate_file``.

    Errors: on all ranks; ConfigError where the prompt has no known token.
    """
    with open_group(world, parts=True) as group:
        run = find_run(run_dir, group, which)
        opened = open_answering(run, open_mesh(run, mesh, world, group), world, given, weights)

        def ask() -> list[Row]:
            row = opened.row(prompt, 0, too_long, "the prompt", Counter())
            if row is None:
                raise ConfigError("the prompt has no token that the run's tokenizer knows; give --prompt TEXT")
            return [row]

        (answers,) = gathered(opened.share(group.together(ask)), group).values()
        if group.rank == 0 and opened.trained.weights == "ema":
            say(_about(opened))
        if group.rank == 0 and answers[0].is_cut:
            say("the answer is cut at the end of model.context")
        return _json_line(answers) if as_json else opened.answers.line(answers)


def gathered(mine: Mapping[int, Sequence[Answer]], group: Group) -> dict[int, Sequence[Answer]]:
    """All ranks' answers, by their places (collective; a part at a time)."""
    numbers, found = sorted(mine), dict[int, Sequence[Answer]]()
    for first in range(0, max(group.all_gather_object(len(numbers))), _AT_ONCE):
        part = {number: mine[number] for number in numbers[first : first + _AT_ONCE]}
        for one in group.all_gather_object(part):
            found |= one
    return found


def _check(lines: Lines, given: Mapping[str, Any]) -> None:
    """Before hours of work: may it be written?"""
    if given.get("n_best", 1) > 1 and not lines.json:
        raise ConfigError(f"--n-best {given['n_best']}: a line of text holds one answer; take --json")
    check_output(lines.output)


def check_output(path: Path) -> None:
    """Errors: ConfigError where there is such a file already; OutputError where its folder cannot be made."""
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already; remove it, or give another --output FILE")
    try:
        make_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot make {path.parent}: {error.strerror}") from None


def _write(lines: Lines, count: int, answers: Mapping[int, Sequence[Answer]], opened: Answering) -> int:
    """Write the output; returns how many answers had line ends, which are spaces now."""
    broken = 0

    def text_lines() -> Iterator[str]:
        nonlocal broken
        broken = 0
        for number in range(count):
            of_row = answers.get(number, [])
            if lines.json:
                yield _json_line(of_row)
                continue
            text = opened.answers.line(of_row) if of_row else ""
            whole = text.replace("\r", " ").replace("\n", " ")
            broken += whole != text
            yield whole

    def fill(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in text_lines())

    write(lines.output, fill)
    return broken


def _json_line(answers: Sequence[Answer]) -> str:
    return json.dumps({"answers": [{"text": one.text, "score": one.score} for one in answers]}, ensure_ascii=False)


def _about(opened: Answering) -> str:
    averaged = ", averaged weights (ema)" if opened.trained.weights == "ema" else ""
    return f"step {opened.run.progress.step}{averaged}"
