"""What a step of each optimizer costs against torch's fused AdamW: a GPT of 30 M parameters, the optimizers in turn.

make bench BENCH=optimizers            ROUNDS=30; on a GPU where there is one
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from table import write

from hvdtrain.machine.matmul import has_fast_bf16
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.options import TransformerOptions
from hvdtrain.optim.muon import NewtonSchulz, WholeMatrices
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer

NAMES = ("adamw", "sgd", "lars", "lamb", "muon")
ROUNDS = int(os.environ.get("ROUNDS", "30"))
SIZES = {"layers": 8, "heads": 8, "width": 512, "context": 256, "bias": False}
VOCABULARY = 8192


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


def compare(device: str, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of a step of each optimizer, each once in a round; and the model's parameters in millions."""
    steps = {name: make_step(name, torch.device(device)) for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(3 + rounds):  # the first ones make states and room
        for name, (step, _) in steps.items():
            started = time.perf_counter()
            step()
            if number >= 3:
                times[name].append(time.perf_counter() - started)
    return times, steps["adamw"][1] / 1e6


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
            ]
        )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    note = (
        f"GPT of {millions:.1f} M parameters ({SIZES['layers']} layers of {SIZES['width']}, vocabulary {VOCABULARY:,}) "
        f"on {where}. {ROUNDS} rounds, each optimizer once in a round; ratios within a round: median and middle half. "
        "Gradients are there already; nothing else is computed. Muon makes all matrices on this one rank, "
        f"in {'bf16' if has_fast_bf16(torch.device(device)) else 'fp32'}; ranks share them."
    )
    head = ["optimizer", "ms per million parameters", "time / adamw", "middle half"]
    print(write("optimizers", "A step of each optimizer", "make bench BENCH=optimizers", head, rows, note))


if __name__ == "__main__":
    main()
