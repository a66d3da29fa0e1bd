"""What a result was made with."""

import subprocess
from pathlib import Path

import torch

from hvdtrain.version import git_state, versions


def test_what_a_result_depends_on():
    found = versions()
    assert {"python", "torch", "numpy", "h5py", "tokenizers", "safetensors"} <= set(found)
    assert found["torch"] == torch.__version__


def test_the_source_of_a_run(tmp_path: Path):
    assert git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t"]
    (tmp_path / "file").write_text("a")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    commit = git_state(tmp_path)
    assert commit is not None
    assert len(commit) == 12
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == f"{commit}-dirty"
