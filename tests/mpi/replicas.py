"""One global batch, shared by the ranks in every way; and what one process makes of it."""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from in_halves import InHalves
from tiny import loss_of, tiny_decoder
from torch import nn

from hvdtrain.comm.group import Group
from hvdtrain.data.batch import IGNORE, Batch
from hvdtrain.data.sampler import even_parts
from hvdtrain.models.decoder import Decoder
from hvdtrain.sync import SyncOptions
from hvdtrain.sync.allreduce import AllReduceOptions
from hvdtrain.tasks.lm import LanguageModel

ROWS, CONTEXT, VOCAB = 12, 8, 50
ONE_BUCKET, TINY_BUCKETS = 1.0, 1e-4  # MiB: all 5,408 parameters of the model; 26 fp32 numbers


def sync_options(bucket_mib: float = ONE_BUCKET) -> SyncOptions:
    return SyncOptions(allreduce=AllReduceOptions(bucket_mib=bucket_mib))


def global_batch(seed: int = 0) -> Batch:
    """Row r counts about r + 1 of its 13 targets: the ranks' weights differ, and so do those of their microbatches."""
    generator = torch.Generator().manual_seed(seed)
    windows = torch.randint(VOCAB, (ROWS, CONTEXT + 1), generator=generator)
    targets = windows[:, 1:].clone()
    counts = torch.rand(ROWS, CONTEXT, generator=generator) < (torch.arange(ROWS)[:, None] + 1) / (ROWS + 1)
    targets[~counts] = IGNORE
    return Batch(windows[:, :-1], targets, int(counts.sum()))


def rows_of(batch: Batch, first: int, count: int) -> Batch:
    tokens, targets = batch.tokens[first : first + count], batch.targets[first : first + count]
    return Batch(tokens, targets, int((targets != IGNORE).sum()))


def share(batch: Batch, group: Group, passes: int) -> list[Batch]:
    """This rank's rows in ``passes`` microbatches, as even as can be; fewer where it has fewer rows."""
    first, count = even_parts(len(batch.tokens), group.size)[group.rank]
    parts = even_parts(count, passes)
    return [rows_of(batch, first + start, rows) for start, rows in parts if rows]


def one_process(model: Decoder, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradient of the whole batch by plain torch: the truth."""
    model = deepcopy(model)
    loss = loss_of(LanguageModel(), model, batch)
    (loss.total / loss.weight).backward()
    return loss.total.item() / loss.weight, {name: p.grad for name, p in model.named_parameters()}


def norm(tensors: Sequence[torch.Tensor]) -> float:
    return float(np.sqrt(sum(float(t.double().square().sum()) for t in tensors)))


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected|, over all tensors together."""
    return norm([found[name] - expected[name] for name in expected]) / norm(list(expected.values()))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def make_plan(group: Group, bucket_mib: float = ONE_BUCKET, seed: int = 0) -> tuple[Decoder, InHalves]:
    model = tiny_decoder(seed)
    return model, InHalves(model, group, sync_options(bucket_mib), "fp32", seed=1)
