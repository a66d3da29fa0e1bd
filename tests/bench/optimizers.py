"""What a step of each optimizer costs against torch's fused AdamW: a GPT of 30 M parameters, the optimizers in turn.

make bench BENCH=optimizers            ROUNDS=30; on a GPU where there is one

By itself, and beside the passes of a batch: those of 4,096 tokens take their turn, a batch has so many of them.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from table import write

from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import whole_replicas
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.cut.whole import Whole
from hvdtrain.data.batch import Batch
from hvdtrain.machine.matmul import has_fast_bf16
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.options import TransformerOptions
from hvdtrain.optim.muon import NewtonSchulz, WholeMatrices
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.tasks.lm import LanguageModel

NAMES = ("adamw", "sgd", "lars", "lamb", "muon")
ROUNDS = int(os.environ.get("ROUNDS", "30"))
SIZES = {"layers": 8, "heads": 8, "width": 512, "context": 256, "bias": False}
VOCABULARY = 8192
PASSES, PASS_TOKENS = "passes", 4096
BATCHES = (4096, 32_768, 262_144)  # tokens of a batch


def make_step(name: str, device: torch.device) -> tuple[Callable[[], None], int]:
    """One step of a model of its own, with gradients as small as training's; and its parameters' number."""
    torch.manual_seed(1)
    model = Decoder(TransformerOptions(**SIZES), VOCABULARY)
    model.initialise(1)
    model.to(device)
    named = dict(model.named_parameters())
    parts = {named[matrix]: rows for matrix, rows in block_matrices(named, model.options).items()}
    dtype = torch.bfloat16 if has_fast_bf16(device) else torch.float32
    matrices = WholeMatrices(parts, NewtonSchulz(dtype))
    optimizer = make_optimizer(named.values(), OptimOptions(name=name, lr=1e-6), matrices=matrices)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3

    def step() -> None:
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, sum(p.numel() for p in model.parameters())


def make_passes(device: torch.device) -> Callable[[], None]:
    """Forward and backward of PASS_TOKENS tokens, in bf16 where the device is fast at it."""
    torch.manual_seed(1)
    options = TransformerOptions(**SIZES)
    model = Decoder(options, VOCABULARY)
    model.initialise(1)
    model.to(device)
    windows = torch.randint(VOCABULARY, (PASS_TOKENS // options.context, options.context + 1)).numpy()
    batch = Batch.from_windows(windows.astype("int32")).to(device)
    precision = PRECISIONS["bf16" if has_fast_bf16(device) else "fp32"]
    replica, task = Whole(model, whole_replicas(LocalGroup()), precision), LanguageModel()

    def passes() -> None:
        replica.forward_backward([batch], task, 1)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return passes


def compare(device: str, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of a step of each optimizer and of ``passes``, each once in a round; and the model's parameters in
    millions.
    """
    made = {name: make_step(name, torch.device(device)) for name in NAMES}
    ways = {name: step for name, (step, _) in made.items()} | {PASSES: make_passes(torch.device(device))}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(3 + rounds):  # the first ones make states and room
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if number >= 3:
                times[name].append(time.perf_counter() - started)
    return times, made["adamw"][1] / 1e6


def whole(times: dict[str, list[float]], name: str, tokens: int) -> float:
    """A step of a batch of so many tokens / that of AdamW: the median over rounds."""
    of_batch = [tokens / PASS_TOKENS * one for one in times[PASSES]]
    rounds = zip(of_batch, times[name], times["adamw"], strict=True)
    return statistics.median((batch + mine) / (batch + adamw) for batch, mine, adamw in rounds)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times, millions = compare(device, ROUNDS)
    rows = []
    for name in NAMES:
        ratios = sorted(mine / adamw for mine, adamw in zip(times[name], times["adamw"], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            [
                name,
                f"{1e3 * statistics.median(times[name]) / millions:.3f}",
                f"{statistics.median(ratios):.2f}",
                f"{ratios[quarter]:.2f} - {ratios[-1 - quarter]:.2f}",
                *(f"{whole(times, name, tokens):.3f}" for tokens in BATCHES),
            ]
        )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    note = (
        f"GPT of {millions:.1f} M parameters ({SIZES['layers']} layers of {SIZES['width']}, vocabulary {VOCABULARY:,}) "
        f"on {where}. {ROUNDS} rounds, each optimizer once in a round; ratios within a round: median and middle half. "
        "Gradients are there already; nothing else is computed. Muon makes all matrices on this one rank, "
        f"in {'bf16' if has_fast_bf16(torch.device(device)) else 'fp32'}; ranks share them. Passes of {PASS_TOKENS:,} "
        f"tokens take {1e3 * statistics.median(times[PASSES]):,.0f} ms; a batch's step is so many of them and a step."
    )
    head = ["optimizer", "ms per million parameters", "time / adamw", "middle half"]
    head += [f"step of {tokens:,} tokens / adamw's" for tokens in BATCHES]
    print(write("optimizers", "A step of each optimizer", "make bench BENCH=optimizers", head, rows, note))


if __name__ == "__main__":
    main()
