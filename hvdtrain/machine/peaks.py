"""What a device could do at most: the denominator of MFU.

A GPU's peak is its maker's figure for dense matrix products, looked up by the name that torch gives (data sheets print
twice as much, for sparse ones). A GPU that is not in the table has no MFU: the figure of a relative would be wrong (of
an MI250 for an MI250X, of a whole A100 for a slice of one). A CPU's peak is measured, because nobody tabulates it.
"""

import re
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hvdtrain.errors import plural


class _Row(NamedTuple):
    """TFLOP/s with accumulation in fp32. None: the device has no such unit, and torch does something else instead."""

    name: str  # the whole of torch.cuda.get_device_name
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float | None  # outside of the tensor cores; on AMD by its matrix cores, which know fp32


_TABLE = [
    # Tesla V100 data sheet (2020): 15.7 and 125 for SXM2 (and SXM3), 14 and 112 for PCIe, 16.4 and 130 for V100S
    _Row(r"Tesla V100-SXM[23]-\d+GB(-LS)?", None, 125.0, None, 15.7),
    _Row(r"Tesla V100-PCIE-\d+GB", None, 112.0, None, 14.0),
    _Row(r"Tesla V100S-PCIE-\d+GB", None, 130.0, None, 16.4),
    # A100 data sheet (2021): the same for SXM4 and PCIe. Not Leonardo's "A100-SXM-64GB", another chip.
    _Row(r"(NVIDIA )?A100-(SXM4|SXM|PCIE|PCIe)-(40|80)GB|NVIDIA A100 80GB PCIe", 312.0, 312.0, 156.0, 19.5),
    # L40S data sheet (2023)
    _Row(r"NVIDIA L40S", 362.0, 362.0, 183.0, 91.6),
    # H100 data sheet, halved (1,979 and 1,513 sparse); fp32 as in the H100 white paper, table 2
    _Row(r"NVIDIA H100 80GB HBM3", 989.4, 989.4, 494.7, 66.9),
    _Row(r"NVIDIA H100 PCIe", 756.0, 756.0, 378.0, 51.2),
    # H100 NVL data sheet (1,671 sparse)
    _Row(r"NVIDIA H100 NVL", 835.5, 835.5, 417.5, 60.0),
    # H200 data sheet (SXM 1,979 sparse, NVL 1,671)
    _Row(r"NVIDIA H200", 989.4, 989.4, 494.7, 66.9),
    _Row(r"NVIDIA H200 NVL", 835.5, 835.5, 417.5, 60.0),
    # GH200 data sheet: the GPU of an H100 SXM, in all memory sizes
    _Row(r"NVIDIA GH200 \d+GB?( HBM3e?)?", 989.4, 989.4, 494.7, 66.9),
    # HGX B200 data sheet, an eighth: 36 PFLOP/s sparse in bf16, 18 in TF32, 600 TFLOP/s in fp32
    _Row(r"NVIDIA B200", 2250.0, 2250.0, 1125.0, 75.0),
    # MI250X data sheet, halved: 383 and 95.7 for the card, whose two dies torch sees as two devices
    _Row(r"AMD Instinct MI250X", 191.5, 191.5, None, 47.9),
    # MI300X data sheet
    _Row(r"AMD Instinct MI300X( OAM)?", 1307.4, 1307.4, 653.7, 163.4),
]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# A measurement at the end of a run is worth its 0.3 s from here on (`metrics.mfu=auto` on a CPU): 0.5 % of the run.
WORTH_MEASURING_AFTER_S = 60.0

# Rows, inner, columns of the products: from small, so that a slow processor measures one; a model's sizes.
_SIZES = [(512, 512, 512), (2048, 384, 1536), (1024, 1024, 1024), (2048, 1024, 2048)]


@dataclass(frozen=True)
class Peak:
    """``flops_per_s``: None where it is not known. ``about``: one line for the user; empty: there is nothing to say."""

    flops_per_s: float | None
    about: str = ""


def find_peak(mode: str, device: torch.device, precision: str, tf32: bool = False) -> Peak:
    """What ``device`` reaches in a run's matrix products (local).

    precision: bf16, fp16 or fp32, also with more behind a dash; tf32: fp32 products may go through TF32 units.
    mode: ``off``: nothing; ``auto``: look a GPU up; ``measure``: also measure a CPU, with this process's threads. Ranks
    that share a node measure at the same time (after a barrier), so that each finds its share of the machine.
    """
    if mode == "off":
        return Peak(None)
    kind = precision.partition("-")[0]
    if device.type == "cuda":
        return _look_up(torch.cuda.get_device_name(device), "tf32" if tf32 and kind == "fp32" else kind)
    if mode != "measure":
        return Peak(None)
    threads = torch.get_num_threads()
    gflops_per_s = measured_ceiling(_DTYPES[kind], threads)
    what = f"{plural(threads, 'thread')}, {kind}"
    return Peak(gflops_per_s * 1e9, f"MFU against {gflops_per_s:,.0f} GFLOP/s, measured ({what})")


def _look_up(name: str, kind: str) -> Peak:
    peak = device_peak(name, kind)
    if peak is None:
        return Peak(None, f"MFU unknown: no {kind} peak of {name!r} in hvdtrain/machine/peaks.py")
    return Peak(peak, f"MFU against {peak / 1e12:,.1f} TFLOP/s, {name}, {kind} dense")


def device_peak(name: str, kind: str) -> float | None:
    """FLOP/s of the GPU that torch calls ``name``, dense, in bf16, fp16, tf32 or fp32; None where it is not known."""
    for row in _TABLE:
        if re.fullmatch(row.name, name):
            if kind == "tf32" and row.tf32 is None:  # it has no TF32 unit: torch computes in fp32
                kind = "fp32"
            tflops_per_s = getattr(row, kind)
            return None if tflops_per_s is None else tflops_per_s * 1e12
    return None


def worth_measuring(mode: str, device: torch.device, trained_s: float) -> bool:
    """At the end of a run: should a CPU's ceiling be measured now? Let one rank's clock decide for all."""
    return mode == "auto" and device.type == "cpu" and trained_s >= WORTH_MEASURING_AFTER_S


@torch.no_grad()
def measured_ceiling(dtype: torch.dtype, threads: int, seconds: float = 0.3) -> float:
    """GFLOP/s of matrix products on this CPU, through the library that the process has chosen (local).

    The best of a few sizes, by the median of each, so that neither an interruption counts nor a moment in which another
    rank let go of its cores. The same call as a model's linear layers. Takes about ``seconds``: at least two products.
    """
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        started, best = time.perf_counter(), 0.0
        for number, (rows, inner, columns) in enumerate(_SIZES, 1):
            until = started + seconds * number / len(_SIZES)
            flops = 2 * rows * inner * columns
            if best and time.perf_counter() + 2 * flops / best > until:  # a slow processor: it has its answer
                continue
            left, right = torch.rand(rows, inner).to(dtype), torch.rand(columns, inner).to(dtype)
            F.linear(left, right)  # the first product makes its kernel
            times = []
            while not times or time.perf_counter() < until:
                began = time.perf_counter()
                F.linear(left, right)
                times.append(time.perf_counter() - began)
            best = max(best, flops / statistics.median(times))
        return best / 1e9
    finally:
        if threads != before:
            torch.set_num_threads(before)
