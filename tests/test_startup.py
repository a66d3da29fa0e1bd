"""What a command must not load: a start costs every rank of every job what it imports."""

import sys
from pathlib import Path

import pytest
from launch import DATA_PREP, HVDTRAIN, Prepared, succeed

COMPUTING = {"torch", "numpy", "h5py", "horovod", "mpi4py", "matplotlib"}
# Seconds and 70 MiB together: torch.optim's own optimizers load them, and some functions on the meta device.
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
OTHERS = {
    "horovod",
    "mpi4py",
    "psutil",
    "tensorboard",
    "matplotlib",
    "tokenizers",
    "triton",
    "transformers",
    "sacrebleu",
}

# Python runs a module of this name first.
_WATCHER = """
import atexit, os, sys

def note():
    with open(os.environ["LOADED"], "w") as file:
        file.write("\\n".join(sys.modules))

atexit.register(note)
"""


def loaded(folder: Path, *words: object, program: tuple[str, ...] = HVDTRAIN) -> set[str]:
    """Every module of a command that must succeed, at its end."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_WATCHER)
    succeed(*words, program=program, env={"PYTHONPATH": str(folder), "LOADED": str(folder / "loaded")})
    return set((folder / "loaded").read_text().splitlines())


@pytest.mark.parametrize("positions", ["learned", "rotary", "sinusoidal"])
def test_training_alone_loads_neither_a_compiler_nor_what_others_need(
    positions: str, prepared: Prepared, tmp_path: Path
):
    """From the first word to the summary, with a step, an evaluation and a checkpoint."""
    settings = ("train.steps=2", "metrics.tensorboard=false", f"model.positions={positions}")
    words = ("train", prepared.recipe, *settings, "--run-dir", tmp_path / "run")
    modules = loaded(tmp_path / "seen", *words)
    assert "torch" in modules
    assert modules & (COMPILER | OTHERS) == set()


@pytest.mark.parametrize("words", [("--help",), ("status", "run"), ("report", "run", "--help")], ids=" ".join)
def test_who_only_looks_loads_nothing_that_computes(words: tuple[str, ...], tmp_path: Path):
    found = [tmp_path / "run" if word == "run" else word for word in words]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 1\n")
    assert loaded(tmp_path / "seen", *found) & COMPUTING == set()


def test_a_report_reads_a_log_without_torch(tmp_path: Path):
    code = "import sys, hvdtrain.commands.report, hvdtrain.jobs.status"
    assert loaded(tmp_path / "seen", code, program=(sys.executable, "-c")) & COMPUTING == set()


def test_preparing_text_loads_neither_torch_nor_mpi(prepared: Prepared, tmp_path: Path):
    words = ("text", "--input", prepared.corpus, "--tokenizer", prepared.tokenizer, "--out", tmp_path / "shards")
    modules = loaded(tmp_path / "seen", *words, program=DATA_PREP)
    assert "tokenizers" in modules
    assert modules & {"torch", "horovod", "mpi4py", "matplotlib", "psutil"} == set()


@pytest.mark.parametrize("program", [HVDTRAIN, DATA_PREP], ids=["hvdtrain", "data_prep"])
def test_nothing_is_searched_for_circles_at_the_end(program: tuple[str, ...], tmp_path: Path):
    """All of torch would be, by every rank."""
    watcher = "import atexit, gc; atexit.register(lambda: open('frozen', 'w').write(str(gc.get_freeze_count())))"
    (tmp_path / "sitecustomize.py").write_text(watcher)
    succeed("--help", program=program, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert int((tmp_path / "frozen").read_text()) > 1000
