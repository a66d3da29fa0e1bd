"""Which token may come next, and which comes: the likeliest candidates of all beams, or a draw.

Shape letters:  B rows (inputs), N beams of a row, V vocabulary, C candidates of a row, L tokens of a text
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hvdtrain.data.sampler import derive
from hvdtrain.tasks.search_options import SearchOptions

BLOCK = 64  # tokens of the vocabulary whose likeliest is looked for first


def obey(
    options: SearchOptions,
    stop: int | None,
    log_p_BNV: torch.Tensor,
    text_BNL: torch.Tensor,
    count_B: torch.Tensor,
    limit_B: torch.Tensor,
) -> None:
    """Set what must not come to -inf, in place. What is forced gets log p = 0, as in transformers.

    text_BNL: all tokens so far, the prompt's too, -1 before it; count_B: of them those that were added.
    limit_B: how many may be. The later of these rules overrides the earlier ones.
    """
    if options.no_repeat_ngram:
        _forbid_repeats(log_p_BNV, text_BNL, options.no_repeat_ngram)
    if options.min_tokens and stop is not None:
        log_p_BNV[:, :, stop].masked_fill_((count_B < options.min_tokens)[:, None], -torch.inf)
    for token, rows_B in ((options.forced_first, count_B == 0), (options.forced_last, count_B + 1 == limit_B)):
        if token is not None:
            log_p_BNV.masked_fill_(rows_B[:, None, None], -torch.inf)
            log_p_BNV[:, :, token].masked_fill_(rows_B[:, None], 0.0)


def _forbid_repeats(log_p_BNV: torch.Tensor, text_BNL: torch.Tensor, size: int) -> None:
    """Forbid each token that followed, anywhere in the text, the ``size - 1`` tokens that are its last now."""
    length = text_BNL.shape[2]
    if length < size:
        return
    grams_BNLn = text_BNL.unfold(2, size, 1)
    last_BNn = text_BNL[:, :, length - size + 1 :]
    repeated_BNL = (grams_BNLn[..., :-1] == last_BNn[:, :, None]).all(-1) & (grams_BNLn[..., 0] >= 0)
    row, beam, place = repeated_BNL.nonzero(as_tuple=True)
    log_p_BNV[row, beam, grams_BNLn[row, beam, place, -1]] = -torch.inf


def likeliest(values_BNV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest of each row's N x V values, sorted: the values [B, C] and their indices below N x V.

    The highest C lie in the C blocks with the highest maxima: so one pass over all, and then few values are sorted.
    """
    beams, vocabulary = values_BNV.shape[1:]
    values_BV = values_BNV.flatten(1)
    blocks, rest = divmod(vocabulary, BLOCK)
    if beams * blocks < 2 * count:
        return values_BV.topk(count)
    whole = vocabulary - rest
    maxima_BNM = values_BNV[:, :, :whole].unflatten(2, (blocks, BLOCK)).amax(3)
    best_BC = maxima_BNM.flatten(1).topk(count, sorted=False).indices
    starts_BC = best_BC // blocks * vocabulary + best_BC % blocks * BLOCK
    device = values_BV.device
    places_BP = (starts_BC[:, :, None] + torch.arange(BLOCK, device=device)).flatten(1)
    rest_NR = torch.arange(beams, device=device)[:, None] * vocabulary + torch.arange(whole, vocabulary, device=device)
    places_BP = torch.cat([places_BP, rest_NR.flatten().expand(len(values_BV), -1)], dim=1)
    top_BC, chosen_BC = values_BV.gather(1, places_BP).topk(count)
    return top_BC, places_BP.gather(1, chosen_BC)


def draw(options: SearchOptions, log_p_BV: torch.Tensor, numbers: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """A token of each row, int64 [B]: a function of the seed, the input's number and how many tokens it has."""
    uniform = [(derive(options.seed, *each, 7) + 0.5) / 2.0**63 for each in zip(numbers, counts, strict=True)]
    cumulated_BV = probabilities(options, log_p_BV).double().cumsum(-1)
    at_B1 = torch.tensor(uniform, dtype=torch.float64, device=log_p_BV.device)[:, None] * cumulated_BV[:, -1:]
    # the first to hold more than that: one of probability 0 holds no more than the one before it
    return torch.searchsorted(cumulated_BV, at_B1, right=True).squeeze(1)


def probabilities(options: SearchOptions, log_p_BV: torch.Tensor) -> torch.Tensor:
    """Distributions to draw from: fp32 [B, V], each sums to 1. Source of top-p: Holtzman et al. 2020."""
    if options.temperature < 1e-6:  # dividing by it would leave the range of fp32
        return F.one_hot(log_p_BV.argmax(-1), log_p_BV.shape[1]).float()
    scaled_BV = log_p_BV.float() / options.temperature
    if 0 < options.top_k < scaled_BV.shape[1]:
        scaled_BV = scaled_BV.masked_fill(scaled_BV < scaled_BV.topk(options.top_k).values[:, -1:], -torch.inf)
    p_BV = scaled_BV.softmax(-1)
    if options.top_p < 1:
        ordered_BV, order_BV = p_BV.sort(descending=True)
        before_BV = ordered_BV.cumsum(-1) - ordered_BV  # what the likelier ones hold; the first is always kept
        dropped_BV = torch.zeros_like(p_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= options.top_p)
        p_BV = p_BV.masked_fill(dropped_BV, 0)
        p_BV /= p_BV.sum(-1, keepdim=True)
    return p_BV
