"""Text from a trained run."""

from pathlib import Path

import torch

from hvdtrain.checkpoint.reader import Weights
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError, say
from hvdtrain.machine.cores import threads_of_rank
from hvdtrain.tasks import make_task
from hvdtrain.tasks.decoding import SamplingOptions, sample
from hvdtrain.trained import find_run, open_model


def generate(
    run_dir: Path,
    prompt: str,
    options: SamplingOptions,
    world: World,
    weights: Weights | None = None,
    which: str = "newest",
) -> str:
    """The prompt and what a checkpoint of the run makes of it. One process.

    weights: see ``open_model``; where they are averaged, standard error says so. which: see ``find_run``.

    Errors: ConfigError under a launcher with several ranks, or where the prompt has no known token.
    """
    if world.size > 1:
        raise ConfigError(f"generate works on one process; {world.launcher} started {world.size}")
    from tokenizers import Tokenizer

    group = LocalGroup()
    torch.set_num_threads(threads_of_rank(group))
    run = find_run(run_dir, group, which)
    learned_from = run.learned_from()
    if not make_task(run.config.task).continues_text:
        raise ConfigError(f"generate goes on with a text; {run_dir} was trained for task.name={run.config.task.name}")
    trained = open_model(run, learned_from.corpora, world, group, weights)
    tokenizer = Tokenizer.from_file(str(learned_from.tokenizer))
    stop = learned_from.corpora.manifest.special_tokens.get("eos")
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or ([stop] if stop is not None else [])
    if not ids:
        raise ConfigError("the prompt is empty; give --prompt TEXT")
    if trained.weights == "ema":
        say(f"step {run.progress.step}, averaged weights (ema)")
    new = list(sample(trained.model, ids, options, trained.device, stop))
    return prompt + tokenizer.decode(new)
