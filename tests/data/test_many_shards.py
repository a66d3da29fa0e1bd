"""Ten thousand shards: from the folder to the first batch in seconds."""

import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from tiny import CPU, multiply, write_data

from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.shards import check_files, read_manifest
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import WindowSource

SHARDS, SHARD_TOKENS, CONTEXT, LIMIT_S = 10_000, 3000, 256, 3.0


def test_opening_ten_thousand_shards():
    """One shard under many names. The limit is ten times what was measured."""
    tokens = np.arange(SHARD_TOKENS) % 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, 1000, train=[tokens])
        multiply(folder, SHARDS)

        began = time.perf_counter()
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        stream = TokenStream([(folder, manifest)], "train")
        source = WindowSource(stream, WindowSampler(len(stream), CONTEXT, 1), Feed(CONTEXT, 1, 64))
        with closing(TrainLoader(source, CPU)) as loader:
            (batch,) = loader.next_step()
            seconds = time.perf_counter() - began
    assert len(stream) == SHARDS * SHARD_TOKENS
    starts = WindowSampler(len(stream), CONTEXT, 1).starts(0, 64)
    assert batch.tokens.tolist() == [((start + np.arange(CONTEXT)) % SHARD_TOKENS % 1000).tolist() for start in starts]
    assert seconds < LIMIT_S
