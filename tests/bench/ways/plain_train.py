"""The other sides of `engine.py`: the same GPT, weights, rows and schedule, trained in plain PyTorch.

    python plain_train.py '{"folder": ..., "way": "nanogpt" | "ddp", "compile": false, "threads": 2, "steps": 300}'

"device": "cuda" trains on a GPU, with TF32 and fused AdamW, as nanoGPT does there.

nanogpt   one process, eager or compiled, fp32 or bf16 autocast: logits kept, mean loss, clip_grad_norm_, AdamW
ddp       under torchrun: hvdtrain's own model and loss in torch's DistributedDataParallel over gloo

"fused": torch's fused AdamW.

Prints one JSON line: rates, the tokens/s of each interval of 10 steps without the first; tokens_per_s, their median;
validation loss; peak memory.
"""

import contextlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from plain_gpt import PlainGPT
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from hvdtrain.models.decoder import Decoder
from hvdtrain.models.losses import LossTerms, linear_cross_entropy
from hvdtrain.models.options import TransformerOptions

NAMES = {  # hvdtrain's -> the plain model's
    "embedding": "tokens", "position": "places", "attention_norm": "norm1", "attention.qkv": "attend",
    "attention.out": "project", "feed_forward_norm": "norm2", "feed_forward.up": "expand",
    "feed_forward.out": "contract",
}  # fmt: skip


class OwnModel(nn.Module):
    """hvdtrain's decoder with its loss, as one module that DDP can wrap."""

    def __init__(self, sizes: dict, vocabulary: int):
        super().__init__()
        self.decoder = Decoder(TransformerOptions(**sizes), vocabulary)
        self.decoder.initialise(1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.decoder(x).flatten(0, 1)
        return linear_cross_entropy(hidden, self.decoder.head.weight, y.flatten(), LossTerms()) / y.numel()


def plain_model(sizes: dict, vocabulary: int) -> nn.Module:
    source = Decoder(TransformerOptions(**sizes), vocabulary)
    source.initialise(1)
    model = PlainGPT(vocabulary, sizes["layers"], sizes["width"], sizes["heads"], sizes["context"])
    weights = {}
    for name, tensor in source.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = tensor
    model.load_state_dict(weights)
    return model


def learning_rate(step: int, lr: float, warmup: int, steps: int) -> float:
    if step < warmup:
        return lr * (step + 1) / warmup
    return 0.1 * lr + 0.45 * lr * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def main(words: dict) -> None:
    folder, steps, lr = Path(words["folder"]), words["steps"], words["lr"]
    setup = json.loads((folder / "setup.json").read_text())
    torch.set_num_threads(words["threads"])
    rank, size = 0, 1
    if words["way"] == "ddp":
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
        model = OwnModel(setup["sizes"], setup["vocabulary"])
        if words.get("own_matmul"):
            from hvdtrain.machine.matmul import use_fast_fp32

            use_fast_fp32()
        wrapped = nn.parallel.DistributedDataParallel(model)
        if words.get("fp16_gradients"):
            wrapped.register_comm_hook(None, fp16_compress_hook)
    else:
        wrapped = model = plain_model(setup["sizes"], setup["vocabulary"])
    device = torch.device(words.get("device", "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model.to(device)
    step_model = torch.compile(wrapped) if words.get("compile") else wrapped
    autocast = torch.autocast(device.type, torch.bfloat16) if words.get("bf16") else contextlib.nullcontext()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=on_gpu or words.get("fused", False))
    windows = np.load(folder / f"windows-{words['rows']}.npy", mmap_mode="r")
    share = words["rows"] // size
    rates, started = [], time.perf_counter()
    for step in range(steps):
        rows = torch.from_numpy(windows[step, rank * share : (rank + 1) * share].astype(np.int64))
        if on_gpu:
            rows = rows.pin_memory().to(device, non_blocking=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, lr, words["warmup"], steps)
        with autocast:
            loss = step_model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 10 == 0:
            loss.item()
            now = time.perf_counter()
            rates.append(10 * words["rows"] * (windows.shape[2] - 1) / (now - started))
            started = now
    rates = rates[1:] or rates
    result = {"rates": rates, "tokens_per_s": statistics.median(rates)}
    if words.get("evaluate"):
        val = torch.from_numpy(np.load(folder / "val.npy").astype(np.int64))
        with torch.no_grad(), autocast:
            losses = [wrapped(rows[:, :-1], rows[:, 1:]).item() * len(rows) for rows in val.to(device).split(8)]
        result["val_loss"] = sum(losses) / len(val)
    status = Path("/proc/self/status").read_text()
    result["peak_mib"] = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    if on_gpu:
        result["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
    if rank == 0:
        print(json.dumps(result), flush=True)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(json.loads(sys.argv[1]))
