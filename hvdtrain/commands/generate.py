"""Text from a trained run: temperature, top-k and nucleus (top-p) sampling, with a key/value cache."""

from collections.abc import Iterator
from pathlib import Path

import torch

from hvdtrain.checkpoint.writer import Weights
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.errors import ConfigError, say
from hvdtrain.machine.cores import threads_of_rank
from hvdtrain.models.decoder import Decoder
from hvdtrain.options import Options, option
from hvdtrain.trained import find_run, open_model


class SamplingOptions(Options):
    max_tokens: int = option(200, "tokens to add to the prompt", ge=1)
    temperature: float = option(0.8, "0: always the likeliest token; 1: the model's own distribution", ge=0)
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: from all", ge=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this probability together", gt=0, le=1)
    seed: int = option(1, "the same seed gives the same text", ge=0, lt=1 << 63)


def next_token_probabilities(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Distribution to draw from: [V] fp32 -> [V] fp32 that sums to 1. Source of top-p: Holtzman et al. 2020."""
    if options.temperature < 1e-6:  # dividing by it would leave the range of fp32
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    logits = logits.float() / options.temperature
    if 0 < options.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(options.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if options.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # what the likelier ones hold; the first is always kept
        probabilities[order[before >= options.top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


@torch.no_grad()
def sample(
    model: Decoder, prompt: list[int], options: SamplingOptions, device: torch.device, stop: int | None
) -> Iterator[int]:
    """Yield new token ids until ``stop`` or ``max_tokens``. prompt: at least one id.

    Beyond the model's context the older half of the text is forgotten, so that the cache is refilled rarely.
    """
    generator = torch.Generator().manual_seed(options.seed)
    context = model.options.context
    ids = prompt[-context:]
    cache, fresh = model.new_cache(1), ids
    for _ in range(options.max_tokens):
        hidden = model(torch.tensor([fresh], device=device), cache)
        logits = model.logits(hidden[:, -1])[0, : model.vocab_size]  # without the padding of the vocabulary
        token = int(torch.multinomial(next_token_probabilities(logits, options).cpu(), 1, generator=generator))
        if token == stop:
            return
        yield token
        ids.append(token)
        fresh = [token]
        if cache[0].length == context:
            ids = ids[-max(1, context // 2) :]
            cache, fresh = model.new_cache(1), ids


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
    trained = open_model(run, learned_from.corpora, world, group, weights)
    if not isinstance(trained.model, Decoder):
        raise ConfigError(f"generate goes on with a text; {run_dir} was trained for task.name={run.config.task.name}")
    tokenizer = Tokenizer.from_file(str(learned_from.tokenizer))
    stop = learned_from.corpora.manifest.special_tokens.get("eos")
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or ([stop] if stop is not None else [])
    if not ids:
        raise ConfigError("the prompt is empty; give --prompt TEXT")
    if trained.weights == "ema":
        say(f"step {run.progress.step}, averaged weights (ema)")
    new = list(sample(trained.model, ids, options, trained.device, stop))
    return prompt + tokenizer.decode(new)
