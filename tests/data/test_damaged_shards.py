"""Token shards that are damaged, missing or could not be written: one error that names the file."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny import write_data, write_tokenizer

from hvdtrain.data.shards import TokenStream, read_json, read_manifest, write_json, write_shard, writing
from hvdtrain.errors import ConfigError, DataError, OutputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path, train=[range(30), range(20)], val=[range(10)])
    return tmp_path


def edit(folder: Path, **changes) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_entry(folder: Path, **changes) -> list[dict]:
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    return [{**shards[0], **changes}, *shards[1:]]


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no shards in {f}: manifest.json is missing"),
    "no folder": (lambda f: shutil.rmtree(f), "no shards in {f} (there is no such folder)"),
    "not JSON": (lambda f: (f / "manifest.json").write_text('{"version": 1,'), "{f}/manifest.json is damaged"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "{f}/manifest.json is damaged"),
    "not text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "{f}/manifest.json is damaged"),
    "a lost field": (lambda f: edit(f, shards=[{"file": "x"}]), "{f}/manifest.json is damaged"),
    "a strange field": (lambda f: edit(f, colour="red"), "{f}/manifest.json is damaged"),
    "newer format": (lambda f: edit(f, version=2), "{f}/manifest.json has format version 2; this hvdtrain reads 1"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "{f}/tokenizer.json is missing"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "{f}/tokenizer.json is not a tokenizer"),
    "other vocabulary": (
        lambda f: write_tokenizer(f / "tokenizer.json", 51),
        "the shards in {f} were made with 50 tokens, but {f}/tokenizer.json has 51",
    ),
    "swapped tokenizer": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text().replace("t3", "s3")),
        "{f}/tokenizer.json is not the tokenizer that made the shards",
    ),
    "a path": (lambda f: edit(f, shards=shard_entry(f, file="../secret.h5")), "outside its folder: '../secret.h5'"),
    "absolute": (lambda f: edit(f, shards=shard_entry(f, file="/etc/passwd")), "outside its folder: '/etc/passwd'"),
    "no shard": (lambda f: (f / "train-00001.h5").unlink(), "shard {f}/train-00001.h5 is listed in the manifest but"),
    "truncated": (lambda f: os.truncate(f / "train-00001.h5", 100), "shard {f}/train-00001.h5 has 100 bytes"),
    "longer": (lambda f: os.truncate(f / "train-00000.h5", 1 << 20), "shard {f}/train-00000.h5 has"),
    "not HDF5": (
        lambda f: (f / "train-00000.h5").write_bytes(bytes((f / "train-00000.h5").stat().st_size)),
        "shard {f}/train-00000.h5 cannot be read as HDF5",
    ),
    "other length": (lambda f: edit(f, shards=shard_entry(f, tokens=31)), "but the manifest says uint16 (31,)"),
    "other dtype": (lambda f: edit(f, dtype="uint32"), "but the manifest says uint32 (30,)"),
    "no dtype": (lambda f: edit(f, dtype="banana"), "banana"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_a_data_error_that_names_the_file(folder: Path, damage: str):
    break_it, message = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(DataError) as caught:
        TokenStream(folder, read_manifest(folder), "train")
    assert message.format(f=folder) in str(caught.value)


@pytest.mark.parametrize("how", [{"chunks": (10,)}, {"compression": "gzip"}])
def test_a_chunked_shard_is_refused(folder: Path, how: dict):
    path = folder / "train-00000.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("tokens", data=np.arange(30, dtype=np.uint16), **how)
    edit(folder, shards=shard_entry(folder, file_bytes=path.stat().st_size))
    with pytest.raises(DataError, match=f"shard {path} is chunked or compressed"):
        TokenStream(folder, read_manifest(folder), "train")


def test_splits_that_are_not_there(folder: Path):
    manifest = read_manifest(folder)
    with pytest.raises(DataError, match="has no test shards; it has: train, val"):
        TokenStream(folder, manifest, "test")
    with pytest.raises(ConfigError, match="no split 'dev'; there are: train, val, test"):
        TokenStream(folder, manifest, "dev")


@pytest.mark.parametrize(("text", "why"), [("[1]", "does not hold a JSON object"), ("{", "cannot read")])
def test_read_json_names_the_file(tmp_path: Path, text: str, why: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json") as caught:
        read_json(tmp_path / "x.json")
    assert why in str(caught.value)
    with pytest.raises(DataError, match=r"missing\.json"):
        read_json(tmp_path / "missing.json")


# --- whole or not at all -----------------------------------------------------------------------------------------


def test_a_failed_write_leaves_what_was_there(tmp_path: Path):
    path = tmp_path / "x.json"
    write_json(path, {"a": "é😀"})
    with pytest.raises(ZeroDivisionError), writing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(OutputError, match=r"cannot write .*x\.json: No space left"), writing(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, os.strerror(28))
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert read_json(path) == {"a": "é😀"}


def test_a_folder_that_does_not_exist(tmp_path: Path):
    with pytest.raises(OutputError, match=r"cannot write .*nowhere/train-00000\.h5: "):
        write_shard(tmp_path / "nowhere", "train", 0, np.arange(3, dtype=np.uint16), np.array([0, 3]))
    with pytest.raises(OutputError, match=r"cannot write .*x\.json: No such file or directory"):
        write_json(tmp_path / "nowhere" / "x.json", {})


def test_a_disk_that_fills_up(tmp_path: Path):
    """A real one for HDF5: the kernel refuses to let the file grow. No part of it may stay, nor a traceback."""
    code = """
import sys, numpy as np
from pathlib import Path
from hvdtrain.data.shards import write_shard
from hvdtrain.errors import OutputError
try:
    write_shard(Path(sys.argv[1]), "train", 0, np.zeros(1 << 18, np.uint16), np.array([0, 1 << 18]))
except OutputError as error:
    print(error)
"""

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_disk, cwd=Path(__file__).parents[2])
    assert "train-00000.h5" in done.stdout, done.stderr
    assert (list(tmp_path.iterdir()), done.returncode) == ([], 0)
