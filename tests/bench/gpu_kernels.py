"""Parts of `gpu.py`: what attention and the loss take by each way, and where the time of a step goes.

Speed is that of random numbers.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from hvdtrain.models.losses import LossTerms, chunk_rows, linear_cross_entropy, score_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from in_halves import InHalves

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.batch import Batch
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.options import TransformerOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.sync import SyncOptions
from hvdtrain.tasks.lm import LanguageModel

Row = tuple[str, str, str]  # what, value, about it
CUDA, HALF = torch.device("cuda"), torch.bfloat16


def timed(work: Callable[[], object], device: str = "cuda", turns: int = 20) -> float:
    """Median seconds of ``work`` on the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = []
    for turn in range(3 + turns):
        wait()
        started = time.perf_counter()
        work()
        wait()
        if turn >= 3:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def attention(rows: int, heads: int, positions: int, head_width: int) -> Iterator[Row]:
    """Forward and backward of one layer, causal, by each of torch's ways."""
    qkv = torch.randn(rows, positions, 3 * heads * head_width, device=CUDA, dtype=HALF, requires_grad=True)

    def run() -> None:
        q, k, v = (x.unflatten(2, (heads, head_width)).transpose(1, 2) for x in qkv.chunk(3, -1))
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        qkv.grad = None

    told = f"{rows} rows, {heads} heads of {head_width}, {positions} positions, forward and backward"
    yield "attention, torch's choice", f"{1e3 * timed(run):.2f} ms", told
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            yield f"attention, {name}", f"{1e3 * timed(run):.2f} ms", told


def loss(targets: int, width: int, vocabulary: int) -> Iterator[Row]:
    """Forward and backward of the loss over a vocabulary: the kernel and eager torch."""
    hidden = torch.randn(targets, width, device=CUDA, dtype=HALF, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width, device=CUDA, dtype=HALF) / width**0.5)
    wanted = torch.randint(vocabulary, (targets,), device=CUDA)

    def run(rows: int = 0, score: Callable | None = None) -> None:
        linear_cross_entropy(hidden, weight, wanted, LossTerms(), rows, score=score).backward()
        hidden.grad = weight.grad = None

    told = f"{targets:,} targets, {vocabulary:,} words, width {width}, forward and backward"
    yield "loss", f"{1e3 * timed(run):.1f} ms", told
    for rows in (2560, 5120, 10240, 20480):
        yield f"loss, {rows:,} targets at once", f"{1e3 * timed(lambda rows=rows: run(rows)):.1f} ms", told
    eager = chunk_rows("cuda", vocabulary)
    yield "loss, eager", f"{1e3 * timed(lambda: run(eager, score_rows)):.1f} ms", f"{eager:,} targets at once"


def step(sizes: dict, vocabulary: int, rows: int) -> Iterator[Row]:
    """The kernels that take most of a step: milliseconds a step, and how often."""
    model = Decoder(TransformerOptions(**sizes), vocabulary)
    model.initialise(0)
    model.to(CUDA).train()
    plan = InHalves(model, LocalGroup(), SyncOptions(), "bf16-weights", 1, "blocks", None)
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    ids = torch.randint(vocabulary, (rows, sizes["context"] + 1), device=CUDA)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * sizes["context"])

    def take(number: int) -> None:
        plan.forward_backward([batch], LanguageModel(), number)
        plan.finish(1.0)
        plan.step(optimizer, 1e-4)

    for number in range(1, 5):
        take(number)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for number in range(5, 8):
            take(number)
        torch.cuda.synchronize()
    kernels = [event for event in found.key_averages() if event.self_device_time_total]
    whole = sum(event.self_device_time_total for event in kernels)
    yield "a step's kernels", f"{whole / 3e3:.1f} ms", f"bf16-weights, blocks compiled, {rows} rows"
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:20]:
        yield event.key[:80], f"{event.self_device_time_total / 3e3:.2f} ms", f"{event.count / 3:.0f} times a step"
    plan.sync.close()
