"""Beam search against transformers' generate: the same exported random BART, one thread, the ways in turn.

make bench BENCH=beam            ROUNDS=5 SENTENCES=160

equal    16 sources of 14 tokens, 5 beams, 30 tokens each: what a step costs
unequal  Multi30k's test sentences: their lengths, a number for each word; ends come where the model puts them, up to 60
         tokens. transformers takes 16 sources at a time, as they come or sorted by length; ours sorts them itself

Ours multiplies as `generate` does (machine/matmul.py), transformers as torch does by itself, and beside it as ours.
Times are processor seconds of the one thread: seconds, where nobody else computes.
"""

import gzip
import os
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from table import write

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

from twins import BEGIN, END, PAD, twins  # noqa: E402

from hvdtrain.machine.matmul import use_fast_fp32  # noqa: E402
from hvdtrain.tasks.search import Input, SearchOptions, search  # noqa: E402

ROUNDS, SENTENCES = int(os.environ.get("ROUNDS", "5")), int(os.environ.get("SENTENCES", "160"))
MULTI30K = Path(os.environ.get("MULTI30K", ROOT.parent / "shared/data/multi30k-en-fr"))
VOCABULARY, BEAMS, AT_ONCE = 8192, 5, 16
BART = {
    "context": 256, "norm_first": False, "embedding_norm": True, "position_offset": 2, "separate_positions": True,
    "head_bias": True, "tied": False,
}  # fmt: skip
SIZES = {
    "tiny": {"layers": 4, "encoder_layers": 4, "width": 128, "ff_width": 256, "heads": 4},
    "base": {"layers": 6, "encoder_layers": 6, "width": 512, "ff_width": 2048, "heads": 8},
}
Texts = list[list[int]]


def sentences(count: int) -> Texts:
    """A number for each word, the same for the same."""
    with gzip.open(MULTI30K / "test_2016_flickr.en.gz", "rt", encoding="utf-8") as file:
        lines = [line.split() for line in file][:count]
    return [[3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in line] for line in lines]


def ours(model: Any, sources: Texts, least: int, most: int) -> Texts:
    inputs = [Input([BEGIN], source, number) for number, source in enumerate(sources)]
    options = SearchOptions(beam=BEAMS, min_tokens=least, max_tokens=most)
    return [found[0].tokens for found in search(model, inputs, options, END)]


@torch.no_grad()
def theirs(model: Any, sources: Texts, least: int, most: int, is_sorted: bool = False) -> Texts:
    order = sorted(range(len(sources)), key=lambda n: len(sources[n])) if is_sorted else range(len(sources))
    found: dict[int, list[int]] = {}
    for begin in range(0, len(sources), AT_ONCE):
        rows = order[begin : begin + AT_ONCE]
        longest = max(len(sources[row]) for row in rows)
        padded = torch.tensor([sources[row] + [PAD] * (longest - len(sources[row])) for row in rows])
        out = model.generate(
            padded, attention_mask=(padded != PAD).long(), num_beams=BEAMS, do_sample=False,
            min_new_tokens=least or None, max_new_tokens=most,
        )  # fmt: skip
        for row, text in zip(rows, out[:, 1:].tolist(), strict=True):
            found[row] = text[: text.index(END)] if END in text else text[:most]
    return [found[row] for row in range(len(sources))]


def with_our_products(way: Callable[[], Any]) -> Callable[[], Any]:
    """The same with fp32 products by the library that ``generate`` chooses."""

    def run() -> Any:
        matmul, sdp = torch.backends.mkldnn.matmul, torch.backends.cuda
        before = matmul.fp32_precision, sdp.flash_sdp_enabled(), sdp.mem_efficient_sdp_enabled()
        use_fast_fp32()
        try:
            return way()
        finally:
            matmul.fp32_precision = before[0]
            sdp.enable_flash_sdp(before[1])
            sdp.enable_mem_efficient_sdp(before[2])

    return run


def in_turn(ways: dict[str, Callable[[], Texts]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Texts]]:
    """Processor seconds of each way in each round, and what it found."""
    texts = {name: way() for name, way in ways.items()}  # the first ones make room
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()
            way()
            times[name].append(time.process_time() - began)
    return times, texts


def rows_of(name: str, times: dict[str, list[float]], texts: dict[str, Texts], tokens: int) -> list[list[str]]:
    """A line for each way; equal: how many texts are token for token those of ours."""
    found = []
    for way, seconds in times.items():
        ratios = [other / mine for other, mine in zip(seconds, times["ours"], strict=True)]
        same = sum(a == b for a, b in zip(texts[way], texts["ours"], strict=True))
        middle = statistics.median(seconds)
        found.append(
            [name, way, f"{middle:.2f}", f"{tokens / middle:,.0f}", f"{statistics.median(ratios):.2f}",
             f"{min(ratios):.2f} - {max(ratios):.2f}", f"{same} of {len(texts[way])}"]
        )  # fmt: skip
    return found


def products_ms(model: Any, steps: int = 20) -> float:
    """Milliseconds of the matrix products that a step cannot do without, each by itself: the ceiling."""
    layers = [part for block in model.blocks for part in block.modules() if isinstance(part, torch.nn.Linear)]
    needed = [layer for layer in layers if all(layer is not block.cross_attention.kv for block in model.blocks)]
    weights = [layer.weight for layer in needed] + [model.head.weight]
    inputs = {weight.shape[1]: torch.randn(AT_ONCE * BEAMS, weight.shape[1]) for weight in weights}
    times = []
    for _ in range(steps):
        began = time.process_time()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for size, shape in SIZES.items():
            mine, other = twins(Path(folder) / size, {**shape, **BART}, VOCABULARY, 2, 1.5, 5.5)
            fixed = torch.randint(3, VOCABULARY, (AT_ONCE, 14), generator=torch.Generator().manual_seed(1)).tolist()
            equal: dict[str, Callable[[], Texts]] = {
                "ours": with_our_products(lambda mine=mine, fixed=fixed: ours(mine, fixed, 30, 30)),
                "transformers": lambda other=other, fixed=fixed: theirs(other, fixed, 30, 30),
                "transformers, our products": with_our_products(
                    lambda other=other, fixed=fixed: theirs(other, fixed, 30, 30)
                ),
            }
            times, texts = in_turn(equal, ROUNDS)
            rows += rows_of(f"{size}, equal", times, texts, AT_ONCE * 30)
            step = {way: 1e3 * statistics.median(seconds) / 30 for way, seconds in times.items()}
            notes.append(
                f"{size}: a step of 80 rows {step['ours']:.1f} ms, transformers {step['transformers']:.1f}; the matrix "
                f"products alone {with_our_products(lambda mine=mine: products_ms(mine))():.1f}."
            )
            if size == "tiny":
                lines = sentences(SENTENCES)
                unequal: dict[str, Callable[[], Texts]] = {
                    "ours": with_our_products(lambda mine=mine, lines=lines: ours(mine, lines, 0, 60)),
                    "transformers": lambda other=other, lines=lines: theirs(other, lines, 0, 60),
                    "transformers, sorted": lambda other=other, lines=lines: theirs(other, lines, 0, 60, True),
                }
                times, texts = in_turn(unequal, min(3, ROUNDS))
                lengths = [len(text) for text in texts["ours"]]
                rows += rows_of("tiny, unequal", times, texts, sum(lengths))
                notes.append(
                    f"unequal: {len(lines)} sentences, texts of {min(lengths)} to {max(lengths)} tokens, median "
                    f"{statistics.median(lengths)}."
                )
    note = (
        f"Random BART, vocabulary {VOCABULARY:,}; tiny: 4 + 4 layers of 128, base: 6 + 6 of 512; {BEAMS} beams, one "
        f"thread. Processor seconds, medians of {ROUNDS} rounds (unequal: {min(3, ROUNDS)}), the ways in turn; load "
        f"average {os.getloadavg()[0]:.1f}. " + " ".join(notes)
    )
    head = ["what", "way", "s", "tokens/s", "time / ours", "least - most", "the same texts"]
    print(write("beam", "Beam search against transformers", "make bench BENCH=beam", head, rows, note))


if __name__ == "__main__":
    main()
