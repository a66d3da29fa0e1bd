"""Text token by token: temperature, top-k and nucleus (top-p) sampling, with a key/value cache."""

from collections.abc import Iterator

import torch

from hvdtrain.models.decoder import Decoder
from hvdtrain.options import Options, option


class SamplingOptions(Options):
    max_tokens: int = option(200, "tokens to add to the prompt", ge=1)
    temperature: float = option(0.8, "0: always the likeliest token; 1: the model's own distribution", ge=0)
    top_k: int = option(0, "draw from the k likeliest tokens only; 0: from all", ge=0)
    top_p: float = option(1.0, "draw from the likeliest tokens that hold this probability together", gt=0, le=1)
    seed: int = option(1, "the same seed gives the same text", ge=0, lt=1 << 63)


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
    cache, fresh = model.new_cache(), ids
    for _ in range(options.max_tokens):
        hidden = model.decode(torch.tensor([fresh], device=device), cache)
        logits = model.logits(hidden[:, -1])[0, : model.vocab_size]  # without the padding of the vocabulary
        token = int(torch.multinomial(next_token_probabilities(logits, options).cpu(), 1, generator=generator))
        if token == stop:
            return
        yield token
        ids.append(token)
        fresh = [token]
        if len(ids) > context:
            ids = ids[-max(1, context // 2) :]
            cache, fresh = model.new_cache(), ids


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
