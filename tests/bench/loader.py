"""Token batches per second, side by side: hvdtrain's loader, the bare gather it is made of, and other ways.

    python tests/bench/loader.py            all numbers from files in the page cache, one process

Every way gives int64 inputs and targets as torch tensors, [B, T] each, but the bare gather, which only copies the
windows out of the mapped file (uint16). `mosaicml-streaming` and `datasets` are measured where they are installed.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from table import write

from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.data.shards import Manifest, write_manifest, write_shard
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import WindowSource
from hvdtrain.files import file_sha256

TOKENS = 50_000_000
SHAPES = ((8, 256), (64, 1024))
ROUNDS, SECONDS = 5, 1.0
Step = Callable[[], object]


def make_data(folder: Path) -> np.ndarray:
    """One set of tokens, as shards and as nanoGPT's flat file."""
    tokens = np.random.default_rng(0).integers(0, 50257, TOKENS, dtype=np.uint16)
    tokens.tofile(folder / "train.bin")
    vocab = {f"t{number}": number for number in range(50257)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    info = write_shard(folder, "train", 0, {"tokens": tokens, "doc_offsets": np.array([0, TOKENS])})
    manifest = Manifest(50257, file_sha256(folder / "tokenizer.json"), "uint16", (info,), {})
    write_manifest(folder, manifest)
    return tokens


def nanogpt(folder: Path, rows: int, context: int) -> Step:
    """nanoGPT's get_batch: the map made anew, random offsets, a stack of rows."""

    def step() -> object:
        data = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        ix = torch.randint(len(data) - context, (rows,))
        x = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in ix])
        return x, y

    return step


def h5py_rows(folder: Path, rows: int, context: int) -> Step:
    """One h5py read a row, in random order."""
    tokens = h5py.File(folder / "train-00000.h5", "r", locking=False)["tokens"]
    random = np.random.default_rng(1)

    def step() -> object:
        starts = random.integers(0, TOKENS - context - 1, rows)
        ids = torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    return step


def _view(folder: Path, context: int) -> np.ndarray:
    tokens = np.asarray(np.memmap(folder / "train.bin", dtype=np.uint16, mode="r"))
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)


def bare_gather(folder: Path, rows: int, context: int) -> Step:
    """The least that can be done: one vectorised copy of the windows, in a new random order."""
    view, random = _view(folder, context), np.random.default_rng(1)
    return lambda: view[random.integers(0, TOKENS - context - 1, rows)]


def gather_int64(folder: Path, rows: int, context: int) -> Step:
    """The same, as tensors that a model takes."""
    view, random = _view(folder, context), np.random.default_rng(1)

    def step() -> object:
        ids = torch.from_numpy(view[random.integers(0, TOKENS - context - 1, rows)].astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    return step


def hvdtrain(folder: Path, rows: int, context: int) -> Step:
    from hvdtrain.data.shards import read_manifest

    stream = TokenStream([(folder, read_manifest(folder))], "train")
    sampler = WindowSampler(len(stream), context, 1)
    return TrainLoader(WindowSource(stream, sampler, Feed(context, 1, rows)), torch.device("cpu")).next_step


def _endless(make: Callable[[], Iterator]) -> Step:
    batches = make()

    def step() -> object:
        nonlocal batches
        if (batch := next(batches, None)) is None:
            batches = make()
            batch = next(batches)
        return batch

    return step


def mosaicml_streaming(folder: Path, rows: int, context: int) -> Step:
    """MDS shards of one row a sample, shuffled, through torch's DataLoader."""
    from streaming import MDSWriter, StreamingDataset

    out = folder / f"mds-{context}"
    tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
    if not out.exists():
        with MDSWriter(out=str(out), columns={"tokens": "ndarray:uint16"}) as writer:
            for start in range(0, TOKENS - context - 1, context):
                writer.write({"tokens": np.array(tokens[start : start + context + 1])})
    dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=rows)

    def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    return _endless(lambda: iter(torch.utils.data.DataLoader(dataset, batch_size=rows, collate_fn=collate)))


def hugging_face_datasets(folder: Path, rows: int, context: int) -> Step:
    """Arrow rows in torch format, random rows by their numbers."""
    import datasets

    datasets.disable_progress_bars()
    out = folder / f"arrow-{context}"
    if not out.exists():
        tokens = np.memmap(folder / "train.bin", dtype=np.uint16, mode="r")
        count = (TOKENS - 1) // (context + 1)
        table = {"ids": list(tokens[: count * (context + 1)].reshape(count, context + 1))}
        kind = datasets.Features({"ids": datasets.Sequence(datasets.Value("uint16"), length=context + 1)})
        datasets.Dataset.from_dict(table, features=kind).save_to_disk(str(out))
    dataset = datasets.load_from_disk(str(out)).with_format("torch")
    random = np.random.default_rng(1)

    def step() -> object:
        ids = dataset[random.integers(0, len(dataset), rows).tolist()]["ids"].long()
        return ids[:, :-1], ids[:, 1:]

    return step


WAYS: dict[str, Callable[[Path, int, int], Step]] = {
    "nanoGPT: memmap, random offsets, stack": nanogpt,
    "h5py, one read a row": h5py_rows,
    "mosaicml-streaming, DataLoader": mosaicml_streaming,
    "Hugging Face datasets, torch format": hugging_face_datasets,
    "bare gather (uint16 copy only)": bare_gather,
    "bare gather, then int64 tensors": gather_int64,
    "hvdtrain": hvdtrain,
}


def measure(step: Step, tokens_per_step: int) -> float:
    """Tokens a second over about SECONDS."""
    batch = 16
    started, steps = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < SECONDS:
        for _ in range(batch):
            step()
        steps += batch
    return steps * tokens_per_step / seconds


def main() -> None:
    torch.set_num_threads(1)
    rows_of_table, missing = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        found: dict[tuple[str, tuple[int, int]], float] = {}
        for shape in SHAPES:
            steps: dict[str, Step] = {}
            for way, make in WAYS.items():
                try:
                    steps[way] = make(folder, *shape)
                    steps[way]()
                except ImportError as error:
                    missing.append(f"{error.name} is not installed")
            rates: dict[str, list[float]] = {way: [] for way in steps}
            for _ in range(ROUNDS):  # in turn, so that a noisy moment meets all
                for way, step in steps.items():
                    rates[way].append(measure(step, shape[0] * shape[1]))
            found.update({(way, shape): statistics.median(values) for way, values in rates.items()})
            del steps
        for way in WAYS:
            if (way, SHAPES[0]) in found:
                cells = [way]
                for shape in SHAPES:
                    rate = found[way, shape]
                    ratios = (
                        rate / found[name, shape] for name in (next(iter(WAYS)), "bare gather (uint16 copy only)")
                    )
                    cells += [f"{rate / 1e6:,.1f}", *(f"{ratio:.2f}" for ratio in ratios)]
                rows_of_table.append(cells)
    head = ["way"]
    for rows, context in SHAPES:
        head += [f"{rows} x {context}: M tokens/s", "/ nanoGPT", "/ bare gather"]
    note = (
        f"{TOKENS / 1e6:.0f} million tokens, all in the page cache; median of {ROUNDS} rounds of {SECONDS:.0f} s, the "
        "ways in turn. hvdtrain's figure includes epochs without repetition, an order by seed, resume by arithmetic, "
        "and a fingerprint of every token; of the others only mosaicml-streaming has such an order. "
        + "; ".join(sorted(set(missing)))
    )
    command = "make bench BENCH=loader"
    print(write("loader", "Loading batches of tokens", command, head, rows_of_table, note))


if __name__ == "__main__":
    main()
