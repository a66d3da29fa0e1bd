"""The other side of the comparison: a character GPT trained in plain PyTorch, in the manner of nanoGPT's CPU recipe.

Windows at random offsets of a memory map, eager fp32, mean loss, `clip_grad_norm_`, AdamW, losses estimated on 20
random batches of both splits every 250 steps. Same model, batch and number of steps as the recipe `shakespeare-char`.

    python tests/bench/ways/plain_gpt.py TEXT_FILE STEPS
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 4, 64, 12


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attend, self.project = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.expand, self.contract = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, positions, width = x.shape
        split = self.attend(self.norm1(x)).split(width, 2)
        heads = [t.view(rows, positions, self.heads, -1).transpose(1, 2) for t in split]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.project(mixed)
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class PlainGPT(nn.Module):
    def __init__(
        self, vocabulary: int, layers: int = LAYERS, width: int = WIDTH, heads: int = HEADS, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(PlainBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:
                last = name.endswith(("project.weight", "contract.weight"))
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * layers) if last else 0.02)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks(self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device)))
        return F.cross_entropy(self.head(self.norm(hidden)).flatten(0, 1), y.flatten())


def main(text_file: str, steps: int) -> None:
    torch.manual_seed(1337)
    text = Path(text_file).read_text(encoding="utf-8")
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    data = np.array([ids[c] for c in text], dtype=np.uint16)
    splits = {"train": data[: int(0.9 * len(data))], "val": data[int(0.9 * len(data)) :]}

    def batch(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        source = splits[split]
        starts = torch.randint(len(source) - CONTEXT, (BATCH,))
        x = torch.stack([torch.from_numpy(source[s : s + CONTEXT].astype(np.int64)) for s in starts])
        y = torch.stack([torch.from_numpy(source[s + 1 : s + 1 + CONTEXT].astype(np.int64)) for s in starts])
        return x, y

    @torch.no_grad()
    def estimate(split: str) -> float:
        return sum(model(*batch(split)).item() for _ in range(20)) / 20

    model = PlainGPT(len(ids))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    for step in range(steps):
        progress = max(0.0, (step - 100) / (steps - 100))
        lr = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        if step % 250 == 0:
            print(f"step {step}: train {estimate('train'):.4f} val {estimate('val'):.4f}")
        model(*batch("train")).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():  # the whole validation split, as hvdtrain counts it
        val = torch.from_numpy(splits["val"].astype(np.int64))
        rows = (len(val) - 1) // CONTEXT
        x, y = val[: rows * CONTEXT].view(rows, CONTEXT), val[1 : rows * CONTEXT + 1].view(rows, CONTEXT)
        print(f"val_loss {model(x, y).item():.4f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
