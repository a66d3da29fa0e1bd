"""Peaks: known devices by their whole names, no guess for the others, and a measurement that is one."""

import time

import pytest
import torch

from hvdtrain.machine import peaks
from hvdtrain.machine.peaks import device_peak, find_peak, measured_ceiling, worth_measuring

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "tf32", "fp32"),
    [
        ("A100-SXM4-40GB", 312, 312, 156, 19.5),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 156, 19.5),
        ("A100-PCIE-40GB", 312, 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 312, 156, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756, 756, 378, 51.2),
        ("NVIDIA H100 NVL", 835.5, 835.5, 417.5, 60),
        ("NVIDIA H200", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA B200", 2250, 2250, 1125, 75),
        ("NVIDIA GH200 480GB", 989.4, 989.4, 494.7, 66.9),
        ("NVIDIA GH200 144G HBM3e", 989.4, 989.4, 494.7, 66.9),
        ("AMD Instinct MI250X", 191.5, 191.5, 47.9, 47.9),
        ("AMD Instinct MI300X", 1307.4, 1307.4, 653.7, 163.4),
        ("NVIDIA L40S", 362, 362, 183, 91.6),
        ("Tesla V100-SXM2-16GB", None, 125, 15.7, 15.7),
        ("Tesla V100-PCIE-32GB", None, 112, 14, 14),
    ],
)
def test_the_table(name: str, bf16, fp16, tf32, fp32):
    found = [device_peak(name, kind) for kind in ("bf16", "fp16", "tf32", "fp32")]
    assert found == [None if peak is None else pytest.approx(peak * 1e12) for peak in (bf16, fp16, tf32, fp32)]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA H800",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of one
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A100-SXM-64GB",  # Leonardo's own, a larger chip
        "NVIDIA GB200",
        "NVIDIA L40",
        "AMD Instinct MI250X/MI250",  # one or the other
        "AMD Instinct MI300A",
        "NVIDIA GeForce RTX 4090",
        "xNVIDIA H200",
    ],
)
def test_no_guess(name: str):
    assert [device_peak(name, kind) for kind in ("bf16", "fp16", "tf32", "fp32")] == [None] * 4


def test_no_name_is_in_two_rows_and_kinds_are_ordered():
    names = ["NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H100 NVL", "Tesla V100-SXM2-32GB", "Tesla V100S-PCIE-32GB"]
    for name in names:
        assert sum(bool(peaks.re.fullmatch(row.name, name)) for row in peaks._TABLE) == 1
    for row in peaks._TABLE:
        known = [peak for peak in (row.fp16, row.tf32, row.fp32) if peak is not None]
        assert known == sorted(known, reverse=True)
        assert row.bf16 in (None, row.fp16)


def test_a_gpu_is_looked_up_and_said_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    for mode in ("auto", "measure"):
        peak = find_peak(mode, GPU, "bf16")
        assert peak.flops_per_s == pytest.approx(989.4e12)
        assert peak.about == "MFU against 989.4 TFLOP/s, NVIDIA H200, bf16 dense"
    assert find_peak("off", GPU, "bf16") == peaks.Peak(None)
    assert find_peak("auto", GPU, "bf16-weights", tf32=True) == peak
    found = [find_peak("auto", GPU, "fp32", tf32).flops_per_s for tf32 in (False, True)]
    assert found == [pytest.approx(66.9e12), pytest.approx(494.7e12)]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Wonder")
    peak = find_peak("auto", GPU, "bf16")
    assert peak.flops_per_s is None
    assert peak.about == "MFU unknown: no bf16 peak of 'NVIDIA Wonder' in hvdtrain/machine/peaks.py"


def test_a_cpu_is_measured_only_where_asked(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(peaks, "measured_ceiling", lambda dtype, threads: asked.append((dtype, threads)) or 123.4)
    assert find_peak("off", CPU, "fp32") == find_peak("auto", CPU, "fp32") == peaks.Peak(None)
    assert asked == []
    peak = find_peak("measure", CPU, "bf16")
    assert peak.flops_per_s == pytest.approx(123.4e9)
    assert peak.about.startswith("MFU against 123 GFLOP/s, measured (")
    assert find_peak("measure", CPU, "fp32", tf32=True).about.endswith(", fp32)")
    find_peak("measure", CPU, "bf16-weights")
    threads = torch.get_num_threads()
    assert asked == [(torch.bfloat16, threads), (torch.float32, threads), (torch.bfloat16, threads)]


def test_a_long_run_is_worth_a_measurement_at_its_end():
    assert worth_measuring("auto", CPU, 60.0)
    assert not worth_measuring("auto", CPU, 59.9)
    assert not worth_measuring("auto", GPU, 1e6)
    assert not worth_measuring("off", CPU, 1e6)
    assert not worth_measuring("measure", CPU, 1e6)  # it has been


def test_the_ceiling_is_what_products_reach():
    """Nothing of a model's sizes is much faster; and it takes the time that it was given, on its number of threads."""
    torch.set_num_threads(2)
    began = time.perf_counter()
    gflops_per_s = measured_ceiling(torch.float32, threads=1, seconds=0.3)
    seconds = time.perf_counter() - began
    assert torch.get_num_threads() == 2  # as before
    assert seconds < 3.0  # 0.3 on an idle machine
    torch.set_num_threads(1)
    left, right = torch.rand(1024, 768), torch.rand(768, 768)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - began)
    reached = 2 * 1024 * 768 * 768 / min(times) / 1e9
    assert 0.3 * reached < gflops_per_s < 3 * reached  # wide: others compute on this machine


@pytest.mark.parametrize("best", range(4))
def test_the_ceiling_counts_the_products_it_makes(monkeypatch: pytest.MonkeyPatch, best: int):
    """By a clock on which a product of size ``best`` takes 1 ms, and the others take twice as long for their FLOPs."""
    rows, inner, columns = sorted(peaks._SIZES, key=lambda size: size[0] * size[1] * size[2])[best]
    now, threads = [0.0], []

    def linear(left: torch.Tensor, right: torch.Tensor) -> None:
        assert left.dtype == right.dtype == torch.bfloat16
        flops = 2 * left.shape[0] * left.shape[1] * right.shape[0]
        now[0] += 1e-3 if flops == 2 * rows * inner * columns else flops * 1e-3 / (rows * inner * columns)

    monkeypatch.setattr(peaks.F, "linear", linear)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    other = torch.get_num_threads() + 3
    assert measured_ceiling(torch.bfloat16, other) == pytest.approx(2 * rows * inner * columns / 1e-3 / 1e9)
    assert 0.25 < now[0] < 0.4
    assert threads == [other, other - 3]


def test_a_slow_processor_has_its_answer_after_the_first_size(monkeypatch: pytest.MonkeyPatch):
    now, calls = [0.0], []

    def linear(left: torch.Tensor, right: torch.Tensor) -> None:
        calls.append(left.shape)
        now[0] += 2.0 * left.shape[0] * left.shape[1] * right.shape[0] / 1e9  # 1 GFLOP/s

    monkeypatch.setattr(peaks.F, "linear", linear)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert measured_ceiling(torch.float32, torch.get_num_threads()) == pytest.approx(1.0)
    assert set(calls) == {(512, 512)}
    assert now[0] < 0.6
