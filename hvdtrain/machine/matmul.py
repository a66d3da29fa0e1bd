"""Makes fp32 matrix products as fast as the processor allows, without giving up fp32.

torch multiplies fp32 matrices with MKL, which leaves AVX-512 unused on AMD processors; oneDNN, also inside torch, uses
it and is about twice as fast there. torch takes oneDNN if it *may* use bf16 inside. Without a matrix engine oneDNN then
still computes in fp32. Nobody promises that, so the result is checked here, and oneDNN is not taken where it is not
fp32. oneDNN is slow at the many tiny products of torch's flash attention in fp32: with it, attention is computed as two
batched products instead, but for causal rows (models/products.py). In bf16 and fp16 torch always takes oneDNN.
"""

import os
from pathlib import Path

import torch

_KERNELS = 64  # kept in each cache: three times what a model needs for batches of one shape


def use_fast_matmul(precision: str) -> str:
    """Set this processor up for a ``precision`` of cut/precision.py (local); returns its library's name.

    To be called before the first product. oneDNN makes a kernel for every shape that it meets. Its cache and torch's
    keep 1,024 each: with batches of changing shape a rank grew by 5 MiB a step, beyond twice its size. They now keep
    fewer, and make the others anew. That costs a tiny model 4 to 11 % where ten shapes take turns, and less than can be
    measured where there are fifty. Limits that the user has set are obeyed.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_KERNELS))
    return use_fast_fp32() if precision == "fp32" else "oneDNN"


def use_fast_fp32() -> str:
    """Choose the library for fp32 matrix products on this processor (local); returns its name, for the record."""
    if "AuthenticAMD" in _cpu_vendor() and torch.backends.mkldnn.is_available():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        if _is_fp32():
            torch.backends.cuda.enable_flash_sdp(False)  # despite its name, also on the CPU
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            return "oneDNN"
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    return "MKL" if torch.backends.mkl.is_available() else "torch"


def _is_fp32() -> bool:
    """Is the relative error of a product that of fp32 (about 1e-7), and not of bf16 (about 3e-3)?"""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((256, 128, 192), (33, 511, 65)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(inner, columns, generator=generator)
        exact = left.double() @ right.double()
        if torch.linalg.norm(left @ right - exact) > 1e-5 * torch.linalg.norm(exact):
            return False
    return True


def has_fast_bf16(device: torch.device) -> bool:
    """Does it multiply matrices of bf16 faster than of fp32? Of a CPU its flags say so: the same in every run."""
    return device.type == "cuda" or bool({"amx_bf16", "avx512_bf16"} & set(_line("flags").split()))


def _cpu_vendor() -> str:
    return _line("vendor_id")


def _line(key: str) -> str:
    """Of what the kernel says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(key)), "")


def use_tf32(allowed: bool) -> None:
    """Let fp32 products on NVIDIA GPUs round their inputs to 10 bits of mantissa (Ampere and later), or not."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
