"""The wheel: what a user gets from ``pip install .`` in an environment that ``make env`` made."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools leaves build folders behind
    source.mkdir()
    for name in ("hvdtrain", "data_prep"):
        (source / name).symlink_to(ROOT / name)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder, source]
    subprocess.run(command, check=True, timeout=240)
    return next(folder.glob("hvdtrain-*.whl"))


def test_recipes_and_licence_are_inside(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {Path(name).name for name in names if name.startswith("hvdtrain/recipes/")}
    assert recipes == {path.name for path in (ROOT / "hvdtrain/recipes").glob("*.yaml")}
    assert any(name.endswith("LICENSE") for name in names)
    assert "data_prep/__main__.py" in names
    assert not any(name.startswith("tests/") for name in names)


def test_installed_package_works_without_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", target, wheel]
    subprocess.run(command, check=True, timeout=240)
    env = {**os.environ, "PYTHONPATH": str(target)}
    asked = (
        "import hvdtrain; from hvdtrain.config import load_config; print(hvdtrain.__file__, load_config('demo').seed)"
    )
    found = subprocess.run(
        [sys.executable, "-c", asked], env=env, cwd=tmp_path, text=True, capture_output=True, timeout=120, check=True
    )
    assert found.stdout.split() == [str(target / "hvdtrain/__init__.py"), "1"]
    version = subprocess.run(
        [target / "bin/hvdtrain", "--version"], env=env, cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    assert (version.returncode, version.stdout.strip()) == (0, "0.1.0")
