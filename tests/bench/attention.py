"""Causal attention on this CPU, forward and backward: torch's flash attention, torch's own products, and ours, in turn.

make bench BENCH=attention       THREADS=2 ROUNDS=9; what hvdtrain/models/products.py goes by
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from table import write

from hvdtrain.machine.matmul import use_fast_matmul
from hvdtrain.models import products

THREADS, ROUNDS = int(os.environ.get("THREADS", "2")), int(os.environ.get("ROUNDS", "9"))
SHAPES = [(12, 4, 64, 32), (16, 4, 128, 64), (8, 6, 256, 64), (4, 12, 512, 64), (2, 12, 1024, 64)]
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def by_torch(flash: bool) -> Way:
    def way(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.backends.cuda.enable_flash_sdp(flash)  # on CPUs too
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return way


WAYS: dict[str, Way] = {"flash": by_torch(True), "math": by_torch(False), "products": products.attend_by_products}


def seconds(way: Way, qkv: torch.Tensor, upstream: torch.Tensor) -> float:
    """Of one pass. qkv: [B, T, 3, H, K], as a layer leaves them."""
    q, k, v = (x.transpose(1, 2) for x in qkv.clone().requires_grad_().unbind(2))
    passes = max(1, int(3e6 / upstream[..., 0].numel() / upstream.shape[2]))
    started = time.perf_counter()
    for _ in range(passes):
        way(q, k, v).backward(upstream, retain_graph=True)
    return (time.perf_counter() - started) / passes


def main() -> None:
    torch.set_num_threads(THREADS)
    library, rows = use_fast_matmul("fp32"), []
    for dtype in (torch.bfloat16, torch.float32):
        for heads in SHAPES:
            number, positions = heads[0], heads[2]
            qkv = torch.randn(number, positions, 3, heads[1], heads[3]).to(dtype)
            upstream = torch.randn(heads).to(dtype)
            found: dict[str, list[float]] = {name: [] for name in WAYS}
            for _ in range(ROUNDS):
                for name, way in WAYS.items():
                    found[name].append(seconds(way, qkv, upstream))
            for name, times in found.items():
                ratios = [base / one for base, one in zip(found["flash"], times, strict=True)]
                spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                shape = " x ".join(map(str, heads))
                rows.append([str(dtype)[6:], shape, name, f"{1e3 * statistics.median(times):.2f}", spread])
    head = ["type", "rows x heads x positions x width", "way", "ms", "speed / flash"]
    note = (
        f"{THREADS} threads, fp32 products by {library}. flash, math: torch's scaled_dot_product_attention; products: "
        f"hvdtrain/models/products.py, which a run takes up to {products.MOST_POSITIONS} positions. Median of {ROUNDS} "
        "rounds, the ways in turn; ratios within a round: median (least to most)."
    )
    print(write("attention", "Causal attention on a CPU", "make bench BENCH=attention", head, rows, note))


if __name__ == "__main__":
    main()
