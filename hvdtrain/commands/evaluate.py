"""Scores of a trained run on a whole split, shared by however many ranks there are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hvdtrain.checkpoint.reader import Weights
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.comm.session import open_group
from hvdtrain.comm.world import World
from hvdtrain.cut import make_replica
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.engine import scores_of
from hvdtrain.machine.cores import threads_of_rank
from hvdtrain.machine.matmul import use_fast_matmul
from hvdtrain.sizing import feed_of
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import Evaluation
from hvdtrain.trained import find_run, open_data, open_model
from hvdtrain.watch.bar import evaluating


def evaluate(
    run_dir: Path,
    data_dirs: Sequence[Path],
    split: str,
    world: World,
    weights: Weights | None = None,
    which: str = "newest",
) -> dict[str, Any]:
    """Scores of a checkpoint of the run: ``{"step", "split", "weights", "data", "val_loss", ...}`` (collective).

    data_dirs: folders of shards to take; none: the run's own. weights: see ``open_model``. which: see ``find_run``.
    ``"data"``: absolute ``folders``, their ``data_digest``, and whether they are the run's ``own``.
    """
    with open_group(world) as group:
        torch.set_num_threads(threads_of_rank(group))
        mesh, run = whole_replicas(group), find_run(run_dir, group, which)
        corpora = open_data(run, data_dirs, group)
        trained, config = open_model(run, corpora, world, group, weights), run.config
        if trained.device.type == "cpu":
            use_fast_matmul(config.precision)

        task = make_task(config.task)

        def open_split() -> Evaluation:
            return task.open_evaluation(corpora, split, feed_of(config, mesh.number, mesh.replicas), config.eval.rows)

        batches = group.together(open_split)
        replica = make_replica(trained.model, mesh, PRECISIONS[config.precision])
        data = {
            "folders": [str(folder.absolute()) for folder, _ in corpora.entries],
            "data_digest": corpora.data_digest,
            "own": corpora.data_digest == run.data_digest,
        }
        step, kind = run.progress.step, trained.weights
        about = {"run": str(run_dir), "step": step, "split": split, "weights": kind, "data": data}
        shown = evaluating(batches(), batches.count, world.is_main)
        return {**about, **scores_of(replica, mesh.replica, shown, task)}
