"""The questions that building the environment asks, with answers that stop it before anything is built.

GPUs, drivers and CUDA builds of torch are stand-ins: programs and a module of those names, first on the paths.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def ask(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "make-env.py"), *words]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_is_asked_for_is_what_setup_cfg_says():
    lines = ask("requirements", "horovod", "torch").stdout.split()
    assert "numpy>=1.26,<3" in lines
    assert "pytest>=8.3,<10" in lines
    assert not {"horovod", "torch"} & {re.split(r"[<>=!]", line)[0] for line in lines}


def test_a_folder_of_wheels_that_lacks_something_is_told_what_and_how_to_fill_it(tmp_path: Path):
    for name in (
        "numpy-2.1.0-cp39-cp39-manylinux_2_17_x86_64.whl",
        "h5py-3.1.0-py3-none-any.whl",
        "tqdm-4.70.0-py3-none-any.whl",
    ):
        (tmp_path / name).touch()
    words = refused(ask("check-wheels", str(tmp_path), "numpy>=1.26,<3", "h5py>=3.12", "tqdm>=4.66", "zstandard>=0.23"))
    assert "numpy is there for another Python or platform (cp39-cp39-manylinux_2_17_x86_64)" in words
    assert "h5py 3.1.0 is there, but h5py>=3.12 is needed" in words
    assert "zstandard>=0.23 is missing" in words
    assert "tqdm" not in words
    assert "make wheels" in words
    assert ask("check-wheels", str(tmp_path), "tqdm>=4.66").returncode == 0
    assert "is no folder" in refused(ask("check-wheels", str(tmp_path / "not"), "tqdm>=4.66"))


def site(folder: Path, **versions: str) -> str:
    """A folder of packages, as a module of a cluster has it."""
    for name, version in versions.items():
        (folder / f"{name}-{version}.dist-info").mkdir(parents=True)
        (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return str(folder)


def test_packages_of_the_site_are_named_with_the_bound_that_they_break(tmp_path: Path):
    there = site(tmp_path, numpy="1.24.1", torch="2.6.0+cu124", pyyaml="6.0.1")
    words = refused(ask("check-system", "numpy>=1.26,<3", "torch>=2.9,<2.14", "pyyaml>=6.0,<7", PYTHONPATH=there))
    assert "numpy 1.24.1 is there, but <3,>=1.26 is needed" in words
    assert "torch 2.6.0+cu124 is there, but <2.14,>=2.9 is needed" in words
    assert "pyyaml" not in words
    assert ask("missing", "numpy>=1.26", "nowhere-to-be-found>=1", PYTHONPATH=there).stdout.split() == [
        "nowhere-to-be-found>=1"
    ]
    assert "numpy==1.24.1" in ask("frozen", PYTHONPATH=there).stdout.split()


def test_a_site_without_torch_is_told_to_load_its_module():
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "make-env.py"), "system"],
        env={"PATH": os.defpath}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "load the site's PyTorch module first" in refused(done)


@pytest.fixture
def machine(tmp_path: Path):
    """``machine(gpus="NVIDIA H100 80GB HBM3, 9.0", nvcc="13.0", cuda="13.0")``: what ``ask cuda`` says there."""

    def look(
        cuda: str | None,
        nvcc: str = "",
        gpus: str = "",
        arch: str = "sm_80 sm_90 compute_90",
        knows: str = "sm_75 sm_80 sm_90",
        usable: bool = True,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        programs, modules = tmp_path / "bin", tmp_path / "modules"
        for folder in (
            programs,
            modules / "torch",
            modules / "nvidia" / "nccl" / "include",
            modules / "nvidia/nccl/lib",
        ):
            folder.mkdir(parents=True, exist_ok=True)
        scripts = {"nvcc": f'[ "$1" = --version ] && echo "release {nvcc}, V{nvcc}.1" || echo {knows}'} if nvcc else {}
        scripts |= {"nvidia-smi": f"printf '%s\\n' '{gpus}'"} if gpus else {}
        for name, text in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\n{text}\n")
            (programs / name).chmod(0o755)
        (modules / "torch" / "__init__.py").write_text(
            "from types import SimpleNamespace as N\n__version__ = '2.11.0'\n"
            f"version, cuda = N(cuda={cuda!r}), N(is_available=lambda: {usable})\n"
            f"_C = N(_cuda_getArchFlags=lambda: {arch!r})\n"
        )
        (modules / "nvidia/nccl/include/nccl.h").write_text(
            "#define NCCL_MAJOR 2\n#define NCCL_MINOR 27\n#define NCCL_PATCH 3\n"
        )
        (modules / "nvidia/nccl/lib/libnccl.so.2").touch()
        return ask("cuda", PYTHONPATH=str(modules), PATH=f"{programs}:/usr/bin:/bin", **env)

    return look


def test_the_environments_own_python_is_not_what_it_is_made_from(tmp_path: Path):
    """`make` puts the environment first on the PATH: each `make` would find another Python and build it anew."""
    own, of_the_machine = tmp_path / "venv" / "bin", tmp_path / "bin"
    for folder, version in ((own, "3.11.98"), (of_the_machine, "3.11.99")):
        folder.mkdir(parents=True)
        (folder / "python3.11").write_text(f"#!/bin/sh\n[ $1 != -V ] || echo Python {version}\n")
        (folder / "python3.11").chmod(0o755)
    (own / "pip").symlink_to(own / "python3.11")
    path = os.pathsep.join([str(own), str(own), str(of_the_machine), os.environ["PATH"]])
    env = {"PATH": path, "HOME": str(tmp_path), "VENV": str(tmp_path / "venv"), "CXX": "nowhere"}
    done = subprocess.run([str(ROOT / "make-env.sh")], env=env, capture_output=True, text=True, timeout=60)
    assert "needs a C++ compiler" in refused(done)
    assert f"make-env: {tmp_path}/venv from Python 3.11.99, " in done.stdout


H100 = "NVIDIA H100 80GB HBM3, 9.0"


def test_nccl_is_built_for_the_gpus_that_are_there(machine):
    home, capabilities, note = machine("13.0", "13.0", f"{H100}\nNVIDIA A100-SXM4-80GB, 8.0").stdout.splitlines()
    assert home.endswith("nvidia/nccl")
    assert capabilities == "80,90"
    assert "NCCL 2.27.3" in note
    assert "2 x NVIDIA A100-SXM4-80GB (8.0), NVIDIA H100 80GB HBM3 (9.0)" in note


def test_where_no_gpu_answers_nccl_is_built_for_those_that_torch_knows(machine):
    _, capabilities, note = machine("13.0", "13.0").stdout.splitlines()
    assert capabilities == "80,90"
    assert "no GPU answers here" in note


def test_a_cpu_build_of_torch_has_no_nccl_and_says_what_the_gpu_would_need(machine):
    assert machine(None).stdout == "\n\nHorovod without NCCL: torch 2.11.0 is a CPU build\n"
    assert "name a CUDA build in TORCH to use it" in machine(None, gpus=H100).stdout
    assert "NCCL=1, but torch 2.11.0 is a CPU build" in refused(machine(None, NCCL="1"))


def test_nccl_may_be_declined(machine):
    assert machine("13.0", "12.4", H100, NCCL="0").stdout.splitlines()[:2] == ["", ""]
    assert "NCCL=yes: expected" in refused(machine("13.0", "13.0", NCCL="yes"))


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"nvcc": "12.4"}, "nvcc .* is CUDA 12.4, but torch 2.11.0 is for CUDA 13.0"),
        (
            {"gpus": "Tesla P100-PCIE-16GB, 6.0", "nvcc": "13.0"},
            "Tesla P100.* has compute capability 60, this torch was",
        ),
        ({"gpus": "NVIDIA Next, 12.0", "nvcc": "13.0"}, "capability 120, which this nvcc does not know"),
        ({"gpus": H100, "nvcc": "13.0", "usable": False}, "cannot use it: too old a driver"),
        ({"NCCL": "1"}, "NCCL=1: .*nvcc is not on the PATH: load a CUDA 13.0 module"),
    ],
)
def test_what_cannot_work_is_said_before_the_long_build(machine, there: dict, said: str):
    import re

    assert re.search(said, refused(machine("13.0", **there)))


def test_without_nvcc_the_loss_is_said(machine):
    assert "WITHOUT NCCL" in machine("13.0").stdout
