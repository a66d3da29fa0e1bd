"""Scores of a trained run on a whole split, shared by however many ranks there are."""

from pathlib import Path
from typing import Any

import torch

from hvdtrain.comm.session import open_group, threads_of_rank
from hvdtrain.comm.world import World
from hvdtrain.data.loader import eval_batches
from hvdtrain.data.shards import TokenStream
from hvdtrain.errors import DataError
from hvdtrain.models.cpu import use_fast_fp32
from hvdtrain.parallel.plan import Plan
from hvdtrain.run_folder import open_run
from hvdtrain.tasks import TASKS


def evaluate(run_dir: Path, data_dir: Path | None, split: str, world: World) -> dict[str, Any]:
    """Scores of the run's newest whole checkpoint: ``{"step", "split", "val_loss", ...}``. Every rank calls this."""
    with open_group(world) as group:
        torch.set_num_threads(threads_of_rank(group))
        run = open_run(run_dir, world, group, data_dir)
        config = run.config
        if run.device.type == "cpu":
            use_fast_fp32()

        def open_split() -> TokenStream:
            stream = TokenStream(run.data_dir, run.manifest, split)
            if len(stream) < 2:
                raise DataError(f"the {split} split of {run.data_dir} has {len(stream)} tokens; nothing to predict")
            return stream

        stream = group.together(open_split)
        plan = Plan(run.model, group, config.sync, config.precision, config.seed)
        batches = eval_batches(stream, config.model.context, config.eval.rows, group.rank, group.size, run.device)
        scores = plan.evaluate(batches, TASKS[config.task.name]())
        return {"run": str(run_dir), "step": run.step, "split": split, "target_tokens": len(stream) - 1, **scores}
