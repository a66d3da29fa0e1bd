"""The GPU's kernel against eager torch: by Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

from hvdtrain.models.losses import LossTerms, score_rows, score_rows_fused

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is loaded
pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "terms",
    [LossTerms(), LossTerms(label_smoothing=0.1), LossTerms(z_loss=1e-2), LossTerms(0.2, 1e-3, ignore=0)],
    ids=["plain", "smoothing", "z-loss", "all"],
)
@pytest.mark.parametrize("width", [300, 4096, 9001])
def test_the_kernel_is_the_eager_way(dtype: torch.dtype, terms: LossTerms, width: int):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(5, width, generator=generator)).to(DEVICE, dtype)
    targets = torch.tensor([0, width - 1, terms.ignore, 7, 250], device=DEVICE)
    loss, grad = score_rows(logits, targets, terms, True)
    alone, none = score_rows_fused(logits, targets, terms, False)
    found, found_grad = score_rows_fused(logits, targets, terms, True)
    assert none is None
    assert alone == found
    assert found.item() == pytest.approx(loss.item(), rel=2e-6)
    assert found_grad.dtype == dtype
    assert not found_grad[targets == terms.ignore].any()
    # fp32: of exponents of 30 that are rounded by 2^-24; else a unit in the last place.
    rounding = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(found_grad, grad, rtol=rounding, atol=1e-7)


def test_what_is_no_number_stays_none():
    logits = torch.zeros(2, 40, device=DEVICE)
    logits[0, 3], logits[1, 5] = torch.nan, torch.inf
    assert score_rows_fused(logits, torch.tensor([1, 1], device=DEVICE), LossTerms(), True)[0].isnan()
