"""Scores of a trained run on a whole split, or on files of texts, shared by however many ranks there are."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvdtrain.checkpoint.reader import Weights
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import World
from hvdtrain.commands.answering import TooLong, open_answering
from hvdtrain.data.lines import LineReader
from hvdtrain.engine import scores_of
from hvdtrain.errors import ConfigError, DataError
from hvdtrain.machine.cores import threads_of_rank
from hvdtrain.machine.matmul import use_fast_matmul
from hvdtrain.sizing import feed_of
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import Evaluation
from hvdtrain.tasks.text_scores import TextScores, names_of
from hvdtrain.trained import find_run, open_data, open_mesh, open_model
from hvdtrain.watch.bar import evaluating

ALL = "bleu chrf rouge"


@dataclass(frozen=True)
class TextOptions:
    """scores: names of ``SCORES``; none: those of the task's options, or of a file all. given: see ``Asked``."""

    scores: str = ""
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """Files that belong together line by line. field, reference_field: of the texts in JSON lines (see ``Lines``).

    invalid: see ``LineReader``; too_long: see ``Answering.rows``.
    """

    input: Path
    references: Sequence[Path]
    field: str = ""
    reference_field: str = "target"
    too_long: TooLong = "refuse"
    invalid: str = "refuse"


def evaluate(
    run_dir: Path,
    data_dirs: Sequence[Path],
    split: str,
    world: World,
    weights: Weights | None = None,
    which: str = "newest",
    texts: TextOptions = TextOptions(),
    mesh: MeshOptions | None = None,
) -> dict[str, Any]:
    """Scores of a checkpoint of the run: ``{"step", "split", "weights", "data", "val_loss", ...}`` (collective).

    data_dirs: folders of shards to take; none: the run's own. weights: see ``open_model``. which: see ``find_run``.
    mesh: see ``open_mesh``. texts: what is decoded too, and how. ``"wall_s"``: seconds that the evaluation took.
    ``"data"``: absolute ``folders``, their ``data_digest``, and whether they are the run's ``own``.
    """
    with open_group(world, parts=True) as group:
        torch.set_num_threads(threads_of_rank(group))
        run = find_run(run_dir, group, which)
        config, ranks = run.config, open_mesh(run, mesh, world, group)
        task = group.together(lambda: make_task(config.task).scored_by(texts.scores, texts.given))
        corpora = open_data(run, data_dirs, group)
        trained = open_model(run, corpora, world, ranks, weights, config.precision)
        if trained.device.type == "cpu":
            use_fast_matmul(config.precision)

        began_s = time.monotonic()

        def open_split() -> Evaluation:
            return task.open_evaluation(corpora, split, feed_of(config, ranks.number, ranks.replicas), config.eval.rows)

        batches = group.together(open_split)
        data = {
            "folders": [str(folder.absolute()) for folder, _ in corpora.entries],
            "data_digest": corpora.data_digest,
            "own": corpora.data_digest == run.data_digest,
        }
        step, kind = run.progress.step, trained.weights
        about = {"run": str(run_dir), "step": step, "split": split, "weights": kind, "data": data}
        shown = evaluating(batches(), batches.count, world.is_main)
        scores = scores_of(trained.replica, ranks.replica, shown, task)
        signed = {"signatures": dict(batches.signatures)} if batches.signatures else {}
        return {**about, **scores, **signed, "wall_s": round(time.monotonic() - began_s, 3)}


def evaluate_files(
    run_dir: Path,
    files: Files,
    world: World,
    weights: Weights | None = None,
    which: str = "newest",
    texts: TextOptions = TextOptions(),
    mesh: MeshOptions | None = None,
) -> dict[str, Any]:
    """Scores of what a checkpoint of the run makes of a file, against references (collective).

    ``{"run", "step", "weights", "input", "references", "lines", "bleu", ..., "signatures", "wall_s"}``; what was left
    out or cut has its count there. Errors: on all ranks; DataError where the files have not as many lines.
    """
    with open_group(world, parts=True) as group:
        run, reader, counts = find_run(run_dir, group, which), LineReader(files.invalid), Counter[str]()
        task = make_task(run.config.task)

        def prepare() -> tuple[TextScores, list[str], list[list[str]]]:
            if not task.compares_texts:
                raise ConfigError(f"task.name={task.name} compares no texts with references; evaluate a --split of it")
            compare = TextScores(names_of(texts.scores or ALL))
            sources = reader.texts(files.input, files.field or task.input_field)
            return compare, sources, references_of(files, reader, len(sources))

        compare, sources, references = group.together(prepare)
        group.agree(len(sources), f"the number of lines of {files.input}")
        opened = open_answering(run, open_mesh(run, mesh, world, group), world, texts.given, weights)
        began_s = time.monotonic()
        rows = group.together(lambda: opened.rows(sources, files.too_long, str(files.input), counts))
        mine = opened.share(rows)
        said = {number: answers[0].text for number, answers in mine.items()}
        answers_cut = sum(group.all_gather_object(sum(answers[0].is_cut for answers in mine.values())))
        if group.rank == 0:  # what nobody answers is an empty text, which counts
            said |= dict.fromkeys({*range(len(sources))} - {row.number for row in rows}, "")
        sums = group.together(lambda: compare.sums([*said.values()], [references[number] for number in said]))
        total = group.all_reduce_sum(torch.tensor(sums, dtype=torch.float64), "hvdtrain.texts").tolist()
        left_out = {f"lines_{what}": number for what, number in counts.items()}
        about = {"run": str(run_dir), "step": run.progress.step, "weights": opened.trained.weights}
        return {
            **about,
            "input": str(files.input),
            "references": [str(path) for path in files.references],
            "lines": len(sources),
            **left_out,
            **({"answers_cut": answers_cut} if answers_cut else {}),
            **reader.counts,
            **compare.scores(total),
            "signatures": compare.signatures(total),
            "wall_s": round(time.monotonic() - began_s, 3),
        }


def references_of(files: Files, reader: LineReader, lines: int) -> list[list[str]]:
    """Of each line its references: a line of each file; an empty one beyond the first is none.

    Errors: DataError where a file has not as many ``lines`` as the input.
    """
    found: list[list[str]] = [[] for _ in range(lines)]
    for number, path in enumerate(files.references):
        of_file = reader.references(path, files.reference_field)
        if len(of_file) != lines:
            raise DataError(f"{files.input} has {lines:,} lines and {path} has {len(of_file):,}: line belongs to line")
        for mine, more in zip(found, of_file, strict=True):
            mine += [text for text in more if text or not number]
    return found
