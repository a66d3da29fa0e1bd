"""scaled_dot_product_attention for heads that share keys, for sliding windows and for packed documents.

Which way is taken, and why (each is exact; fp32 sums in another order):

- heads that share keys (Ainslie et al. 2023, "GQA"): flash attention on CUDA reads the shared ones by itself. Queries
  that all see the same keys are laid side by side, as if they were one head's. Elsewhere the keys are repeated: on the
  CPU that is as fast as ``enable_gqa``, and on CUDA ``enable_gqa`` without flash attention would keep T x T scores.
- causal attention on a CPU: short rows as batched products, long ones by flash attention (products.py).
- a sliding window (Beltagy et al. 2020, "Longformer"; Mistral): blocks of queries against two blocks of keys each, in
  place of T x T (1,024 positions and a window of 128 on a CPU: 2 to 6 times faster than a mask).
- documents (``Runs``): on the CPU one call for each (1 to 8 times faster than a mask, the shorter the documents the
  more). On CUDA torch's varlen_attn, which is flash attention told where the runs begin, and the window with it; where
  it does not fit (``runs_fit``) a mask.

Shape letters:  B rows, T positions of queries, S of keys, H heads, G heads of keys and values, K width of a head,
                N runs
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._compile import _disable_dynamo  # torch.compiler.disable would load the compiler to load this file

from hvdtrain.models.masks import window_mask
from hvdtrain.models.products import attend_by_flash, attend_by_products, flash_fits, products_fit

# What torch's varlen_attn knows: windows, keys that heads share.
_VARLEN_WINDOWS, _VARLEN_SHARES = torch.__version__ >= (2, 11), torch.__version__ >= (2, 13)


class Runs(NamedTuple):
    """Neighbouring positions that see one another, and no others: a row's documents, or whole rows.

    ``offsets``: where they begin in the rows laid end to end, and the end of the last: int32 [N + 1], 0 to B * T.
    """

    offsets: torch.Tensor


def document_runs(segments_BT: torch.Tensor, device: torch.device) -> Runs:
    """Runs of equal numbers within a row, padding too. On the host it waits for no device; ``device``: of the result.

    Other than ``masks.packed_mask`` it takes a number that comes again in its row for another document.
    """
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    begins = begins_BT.flatten().nonzero().squeeze(1)
    offsets = torch.cat([begins, begins.new_tensor([segments_BT.numel()])])
    return Runs(offsets.int().to(device, non_blocking=True))


def row_runs(tokens_BT: torch.Tensor) -> Runs:
    """Each row a run."""
    rows, positions = tokens_BT.shape
    return Runs(torch.arange(0, (rows + 1) * positions, positions, dtype=torch.int32, device=tokens_BT.device))


def runs_fit(device: torch.device, dtype: torch.dtype, head_width: int, dropout: float) -> bool:
    """May ``attend`` be given runs? ``dtype``: of the queries. Not on CUDA in fp32, with dropout, on older GPUs, or
    where torch's varlen_attn knows no window.
    """
    fits = dropout == 0 and _VARLEN_WINDOWS and _flash_fits(device, dtype, head_width)
    return device.type == "cpu" or fits


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """In which type a layer of this weight makes its products: autocast's, where that is on."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def attend(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    sight: torch.Tensor | Runs | None = None,
    causal: bool = False,
    window: int = 0,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(K)) V: [B, H, T, K]. Heads h * H / G to (h + 1) * H / G - 1 read keys' head h.

    sight: a bool mask [B, 1, T, S], or what spreads to it, which says alone who sees whom; or numbers [B, H, T, S],
        or what spreads to it, that are added to the scores, -inf where a query must not look; or Runs: causal in each.
    causal: a query sees keys up to its own position (T = S).
    window: the last of them, its own included; 0: all. Of causal attention and of Runs; a mask has it already.
    """
    if isinstance(sight, Runs):
        attend_runs = _attend_runs_flash if q_BHTK.is_cuda else _attend_runs_apart
        return attend_runs(q_BHTK, k_BGSK, v_BGSK, sight.offsets, window, dropout)
    if causal and sight is None:
        return _attend_causal(q_BHTK, k_BGSK, v_BGSK, window, dropout)
    if k_BGSK.shape[1] != q_BHTK.shape[1] and _is_alike_for_heads(q_BHTK, k_BGSK, sight):
        grouped = q_BHTK.unflatten(1, (k_BGSK.shape[1], -1)).flatten(2, 3)  # [B, G, H / G * T, K]
        if sight is not None and sight.shape[-2] > 1:
            sight = sight.repeat(1, 1, q_BHTK.shape[1] // k_BGSK.shape[1], 1)
        return _sdpa(grouped, k_BGSK, v_BGSK, sight, False, dropout).reshape(q_BHTK.shape)
    return _sdpa(q_BHTK, k_BGSK, v_BGSK, sight, False, dropout)


def _is_alike_for_heads(q: torch.Tensor, k: torch.Tensor, sight: torch.Tensor | None) -> bool:
    """Do the queries of all heads see the same keys? And if each query sees others, are they so few (decoding) that
    repeating the mask is cheaper than repeating the keys?
    """
    if sight is None or sight.shape[-3:-1] == (1, 1):
        return True
    return sight.dim() == 4 and sight.shape[1] == 1 and q.shape[2] < k.shape[2]


# --- causal, with or without a window -----------------------------------------------------------------------------


def _attend_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, dropout: float) -> torch.Tensor:
    positions = q.shape[2]
    if not 0 < window < positions:
        return _sdpa(q, k, v, None, True, dropout)
    blocks = -(-positions // window)
    if (2 * blocks - 1) * window**2 < positions**2:
        return _attend_blocks(q, k, v, window, blocks, dropout)
    return _sdpa(q, k, v, window_mask(positions, window, q.device), False, dropout)


def _attend_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, blocks: int, dropout: float
) -> torch.Tensor:
    """Blocks as long as the window: the first sees itself, each other one itself and the block before."""
    # window 3   keys  0 1 2 3 4 5 6 7 8
    # query 0          x
    #       1          x x                    first
    #       2          x x x
    #       3            x x x
    #       4              x x x              rest: the same picture for every block
    #       5                x x x
    #       6                  x x x
    rows, positions = q.shape[0], q.shape[2]
    q, k, v = (F.pad(x, (0, 0, 0, blocks * window - positions)) for x in (q, k, v))  # nobody looks at what is added
    first = _sdpa(q[:, :, :window], k[:, :, :window], v[:, :, :window], None, True, dropout)

    def with_the_block_before(x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(2, (blocks, window))
        return torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3).transpose(1, 2).flatten(0, 1)

    sees = window_mask(2 * window, window, q.device)[window:]
    own = q[:, :, window:].unflatten(2, (blocks - 1, window)).transpose(1, 2).flatten(0, 1)
    rest = _sdpa(own, with_the_block_before(k), with_the_block_before(v), sees, False, dropout)
    rest = rest.unflatten(0, (rows, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :positions]


# --- runs ---------------------------------------------------------------------------------------------------------


def _end_to_end(x_BHTK: torch.Tensor) -> torch.Tensor:
    """[B T, H, K]"""
    return x_BHTK.transpose(1, 2).flatten(0, 1)


def _attend_runs_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, window: int, dropout: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # loads the compiler: a second that only its users pay

    assert dropout == 0, "varlen_attn has no dropout"
    rows, heads, positions, _ = q.shape
    shared = heads // k.shape[1]
    if shared > 1 and not _VARLEN_SHARES:
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    out = varlen_attn(
        *(_end_to_end(x) for x in (q, k, v)),
        *(offsets, offsets),
        *(positions, positions),  # no run is longer; the longest itself would have to be asked of the device
        window_size=(window - 1 if window else -1, 0),
        **({"enable_gqa": True} if shared > 1 else {}),
    )
    return out.unflatten(0, (rows, positions)).transpose(1, 2)


@_disable_dynamo  # the lengths are new in every batch, and a graph made for some would be made again for others
def _attend_runs_apart(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, window: int, dropout: float
) -> torch.Tensor:
    rows, _, positions, _ = q.shape
    lengths = offsets.diff().tolist()
    pieces = (_end_to_end(x).split(lengths) for x in (q, k, v))
    outs = [
        _attend_causal(*(x.transpose(0, 1)[None] for x in run), window, dropout)[0].transpose(0, 1)
        for run in zip(*pieces, strict=True)
    ]
    return torch.cat(outs).unflatten(0, (rows, positions)).transpose(1, 2)


# --- torch's attention --------------------------------------------------------------------------------------------


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool, dropout: float
) -> torch.Tensor:
    groups, shared = k.shape[1], q.shape[1] // k.shape[1]
    by_itself = shared > 1 and mask is None and _flash_fits(q.device, q.dtype, q.shape[3])
    if shared > 1 and not by_itself:
        k, v = (x.unsqueeze(2).expand(-1, groups, shared, -1, -1).flatten(1, 2) for x in (k, v))
    if is_causal and products_fit(q, dropout):
        return attend_by_products(q, k, v)
    if is_causal and flash_fits(q, dropout):
        return attend_by_flash(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=by_itself)


def _flash_fits(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Will flash attention take this? It is NVIDIA's Ampere and later; AMD's has not been tried."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    recent = torch.cuda.get_device_properties(device).major >= 8
    return recent and dtype in (torch.float16, torch.bfloat16) and head_width % 8 == 0 and head_width <= 256
