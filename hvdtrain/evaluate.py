"""Scores of a trained run on a whole split, shared by however many ranks there are."""

from pathlib import Path
from typing import Any

import torch

from hvdtrain.checkpoint import Weights
from hvdtrain.comm.session import open_group, threads_of_rank
from hvdtrain.comm.world import World
from hvdtrain.models.cpu import use_fast_matmul
from hvdtrain.parallel.plan import Plan
from hvdtrain.run_folder import open_run
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import Evaluation


def evaluate(
    run_dir: Path,
    data_dir: Path | None,
    split: str,
    world: World,
    weights: Weights | None = None,
    which: str = "newest",
) -> dict[str, Any]:
    """Scores of a checkpoint of the run: ``{"step", "split", "weights", "val_loss", ...}`` (collective).

    weights, which: see ``open_run``.
    """
    with open_group(world) as group:
        torch.set_num_threads(threads_of_rank(group))
        run = open_run(run_dir, world, group, data_dir, weights, which)
        config = run.config
        if run.device.type == "cpu":
            use_fast_matmul(config.precision)

        task = make_task(config.task)

        def open_split() -> Evaluation:
            return task.open_evaluation(run.corpora, split, config.feed(group.rank, group.size), config.eval.rows)

        batches = group.together(open_split)
        plan = Plan(run.model, group, config.sync, config.precision, config.seed)
        about = {"run": str(run_dir), "step": run.step, "split": split, "weights": run.weights}
        return {**about, **plan.evaluate(batches(), task)}
