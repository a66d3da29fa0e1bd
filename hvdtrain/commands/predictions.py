"""Answers to the questions of a split by their ids, as SQuAD's official scripts read them.

    FILE              {"56be4db0acb8001400a502ec": "Denver Broncos", ...}
    NA_PROBS          {"56be4db0acb8001400a502ec": 0.0031, ...}           of 2.0: how sure it is that there is no answer

An answer that the run does not give is the empty text. Where ``na_probs`` are written too, each question has its best
text and the official script decides, so that it finds the best thresholds of exactly these answers:

    evaluate-v2.0.py dev.json FILE
    evaluate-v2.0.py dev.json FILE --na-prob-file NA_PROBS --na-prob-thresh 0.5        both: the same scores
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hvdtrain.checkpoint.reader import Weights
from hvdtrain.comm.mesh import MeshOptions
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import World
from hvdtrain.commands.generate import check_output
from hvdtrain.errors import ConfigError, DataError, plural, say
from hvdtrain.files import write_json
from hvdtrain.machine.cores import threads_of_rank
from hvdtrain.machine.matmul import use_fast_matmul
from hvdtrain.sizing import feed_of
from hvdtrain.tasks import make_task
from hvdtrain.tasks.answers import Prediction, Predictions
from hvdtrain.trained import find_run, open_data, open_mesh, open_model
from hvdtrain.watch.bar import evaluating


@dataclass(frozen=True)
class Split:
    """Questions of the run's own shards, or of those in ``data``, and the files that get the answers."""

    name: str
    output: Path
    na_probs: Path | None = None
    data: Sequence[Path] = ()


def predict_split(
    run_dir: Path, split: Split, world: World, weights: Weights | None = None, which: str = "newest",
    mesh: MeshOptions | None = None,
) -> None:  # fmt: skip
    """Answer a split (collective): any launcher, any number of ranks, the same bytes.

    weights: see ``open_model``. which: see ``find_run``. mesh: see ``open_mesh``.
    Errors: on all ranks; ConfigError where the task's records have no ids, or a file is there already; DataError where
    an id stands twice.
    """
    with open_group(world, parts=True) as group:
        group.on_main(lambda: _check(split))
        torch.set_num_threads(threads_of_rank(group))
        run = find_run(run_dir, group, which)
        task, corpora = make_task(run.config.task), open_data(run, split.data, group)
        ranks = open_mesh(run, mesh, world, group)
        trained = open_model(run, corpora, world, ranks, weights)
        if trained.device.type == "cpu":
            use_fast_matmul("fp32")

        def open_split() -> Predictions:
            return task.predictions(
                corpora, split.name, feed_of(run.config, ranks.number, ranks.replicas), run.config.eval.rows
            )

        @torch.no_grad()
        def work() -> list[Prediction]:
            shown = evaluating(opened.batches(), opened.count, group.rank == 0, "answering")
            model, device = trained.replica.answering, trained.device
            found = [one for batch in shown for one in opened.answer(model, batch.to(device))]
            return found if ranks.speaks else []

        opened = group.together(open_split)
        shares = group.all_gather_object(group.together(work))
        found = sorted(one for share in shares for one in share)
        group.on_main(lambda: _write(found, split))
        if group.rank == 0:
            none = sum(not one.decided for one in found)
            left = f"; {none:,} of them with none" if none else ""
            say(f"{plural(len(found), 'question', ',')} answered, step {run.progress.step}{left}: {split.output}")


def _check(split: Split) -> None:
    """Before hours of work: may the files be written?"""
    if split.na_probs == split.output:
        raise ConfigError(f"--na-probs {split.na_probs} is --output too; give each a file of its own")
    for path in [split.output] if split.na_probs is None else [split.output, split.na_probs]:
        check_output(path)


def _write(found: Sequence[Prediction], split: Split) -> None:
    twice = [name for name, count in Counter(one.id for one in found).items() if count > 1]
    if twice:
        more = f" (and {len(twice) - 1:,} more)" if len(twice) > 1 else ""
        raise DataError(
            f"the {split.name} split has several questions of the id {twice[0]!r}{more}: a file has one of each"
        )
    write_json(split.output, {one.id: one.decided if split.na_probs is None else one.text for one in found})
    if split.na_probs is not None:
        write_json(split.na_probs, {one.id: one.none for one in found})
