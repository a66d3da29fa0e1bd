"""The faster library for matrix products is taken only where it is as exact."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_decoder

from hvdtrain.machine import matmul as cpu

DEFAULT = "MKL" if torch.backends.mkl.is_available() else "torch"


def test_what_is_chosen_here_is_fp32():
    assert cpu.use_fast_fp32() in (DEFAULT, "oneDNN")
    torch.manual_seed(0)
    for rows, inner, columns in ((16, 64, 64), (512, 768, 300), (1, 1000, 7)):
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        exact = left.double() @ right.double()
        assert torch.linalg.norm(left @ right - exact) < 1e-6 * torch.linalg.norm(exact)


def test_the_model_computes_the_same():
    torch.manual_seed(0)
    model, tokens = tiny_decoder(width=64, context=32), torch.randint(0, 50, (4, 33))
    results = []
    for choose in (lambda: None, cpu.use_fast_fp32):
        choose()
        logits = model.logits(model(tokens[:, :-1]))
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for before, after in zip(*results, strict=True):
        assert torch.linalg.norm(after - before) <= 1e-5 * torch.linalg.norm(before)


def test_other_processors_keep_torchs_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "_cpu_vendor", lambda: "vendor_id : GenuineIntel")
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert cpu.use_fast_fp32() == DEFAULT
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert torch.backends.cuda.flash_sdp_enabled()


def test_an_inexact_library_is_refused(monkeypatch: pytest.MonkeyPatch):
    """A processor with bf16 matrix engines takes the offer, and would train in bf16 without a word."""
    monkeypatch.setattr(cpu, "_cpu_vendor", lambda: "vendor_id : AuthenticAMD")
    monkeypatch.setattr(cpu, "_is_fp32", lambda: False)
    assert cpu.use_fast_fp32() == DEFAULT
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.cuda.flash_sdp_enabled()


def test_the_check_knows_bf16_from_fp32(monkeypatch: pytest.MonkeyPatch):
    assert cpu._is_fp32()
    product = torch.Tensor.__matmul__

    def in_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if left.dtype == torch.float64:
            return product(left, right)
        return product(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", in_bf16)
    assert not cpu._is_fp32()


def test_sixteen_bits_keep_flash_attention(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "use_fast_fp32", lambda: "called")
    assert cpu.use_fast_matmul("fp32") == "called"
    assert {cpu.use_fast_matmul(precision) for precision in ("bf16", "bf16-weights", "fp16")} == {"oneDNN"}
    assert torch.backends.cuda.flash_sdp_enabled()
