"""Mutants of files that the package reads, and the judge of what becomes of them, in a process of its own.

    mutate_config, mutate_shards, mutate_checkpoint      change files, by a random generator alone
    judge_config, judge_shards, judge_checkpoint         "right" or "refused"; anything else is wrong

Right: what was loaded is what the file says, found in another way, or, where nobody has made the digests fit, what was
written. Refused: by an error of our own, in one line.
"""

import json
import os
import random
import re
import select
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from checkpoints import state_of
from safetensors import safe_open
from threads import on_ranks
from tiny import CPU, documents, labelled, pairs, random_tokens, rewrite, seal, tiny_decoder, write_corpus

from hvdtrain import sizing
from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.reader import load
from hvdtrain.checkpoint.retention import folder_of
from hvdtrain.checkpoint.valid import newest_valid
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.config import RunConfig, describe_options, dump_yaml, flatten, load_config, make_config, recipe_names
from hvdtrain.config import recipe_text as text_of
from hvdtrain.data.corpora import DataOptions, check_corpora, open_corpora
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.data.shards import expected_datasets, map_shard
from hvdtrain.errors import HvdtrainError
from hvdtrain.files import fields_sha256, file_sha256
from hvdtrain.models.presets import PRESETS
from hvdtrain.optim.ema import Ema, EmaOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.slices import Rect, Slice, whole_slices
from hvdtrain.tasks import TaskOptions, make_task

RIGHT, REFUSED = "right", "refused"
KEEP_ALL = CheckpointOptions(keep_last=0)
LIMIT_S = 30  # for one mutant, on a busy machine
_LONGEST = 20_000  # characters of a message
HOSTILE: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "é😀\u202e",
    "0" * 64,
    [],
    [0],
    {},
    {"a": 1},
    [[[[]]]],
]
_YAML = [
    "!!python/object/apply:os.system ['touch PWNED']",
    "!!python/object/new:os.system ['touch PWNED']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!binary x",
    "!!set {a}",
    "!!bool x",
    "!!int x",
    "!!timestamp x",
    "!!omap [1]",
    "&a [*a]",
    "&a {<<: *a}",
    "*a",
    "<<: {a: 1}",
    ".nan",
    "-.inf",
    "1e999",
    "1e-3",
    "0x" + "f" * 5000,
    "9" * 5000,
    "1:" * 3000 + "1",
    "2020-99-99",
    "~",
    "[" * 3000,
    "{a: " * 3000,
    "? [a]",
    "--- 1",
    "%YAML 9.9",
    '"\\0"',
    '"\\ud800"',
    "'",
    '"',
    "\t",
    "|",
    ">",
    "{",
    "}",
    ": ",
    "- ",
    "#",
    "\x00",
    "\ufeff",
    "\x85",
]


# --- the judge's process ---------------------------------------------------------------------------------------------


def judged(judge: Callable[..., str], *args: Any, limit_s: float = LIMIT_S) -> str:
    """What ``judge(*args)`` returns, in a child: libhdf5 may crash on a damaged file, and anything may hang."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            verdict = judge(*args)
        except BaseException:
            verdict = f"wrong: {traceback.format_exc()}"
        os.write(writer, verdict.encode(errors="replace")[-4000:])
        os._exit(0)
    os.close(writer)
    verdict, until = b"", time.monotonic() + limit_s
    while True:
        if not select.select([reader], [], [], max(0.0, until - time.monotonic()))[0]:
            os.kill(child, signal.SIGKILL)
            verdict = f"wrong: no answer within {limit_s} s".encode()
            break
        if not (more := os.read(reader, 1 << 16)):
            break
        verdict += more
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return verdict.decode() or f"wrong: died of signal {os.WTERMSIG(status)}"


def _refused(error: HvdtrainError) -> str:
    text = str(error)
    return REFUSED if text and len(text) < _LONGEST else f"wrong: a message of {len(text)} characters"


# --- bytes and trees -------------------------------------------------------------------------------------------------


def mutate_bytes(chance: random.Random, content: bytes) -> bytes:
    """A bit, a byte, a piece lost, doubled, zeroed, moved, or the end."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        at = chance.randrange(len(changed) + 1)
        to = min(len(changed), at + chance.choice((1, 2, 4, 8, 64, 1000)))
        how = chance.randrange(8)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif how == 1 and at < len(changed):
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif how == 2:
            changed[at:to] = b""
        elif how == 3:
            changed[at:at] = changed[at:to]
        elif how == 4:
            changed[at:to] = bytes(to - at)
        elif how == 5:
            other = chance.randrange(len(changed) + 1)
            changed[at:to] = changed[other : other + to - at]
        elif how == 6:
            changed[at:to] = chance.choice((b"\xff", b"\x00")) * (to - at)
        elif how == 7 and chance.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutate_tree(chance: random.Random, tree: Any) -> Any:
    """A JSON value in which one value, key or number of entries is another."""
    tree = json.loads(json.dumps(tree))
    places: list[tuple[Any, Any]] = []
    todo = [tree]
    while todo:
        node = todo.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                todo.append(value)
    node, key = chance.choice(places)
    value, how = node[key], chance.randrange(8)
    if how == 0:
        del node[key]
    elif how == 1:
        node[key] = json.loads(json.dumps(chance.choice([other[at] for other, at in places])))
    elif how == 2 and isinstance(node, dict):
        node[chance.choice(["colour", *node])] = chance.choice(HOSTILE)
    elif how == 3 and isinstance(node, list):
        node.append(chance.choice([value, *HOSTILE]))
    elif how == 4 and type(value) in (int, float):
        node[key] = chance.choice((value + 1, value - 1, -value, value * 2, value * 1.0, str(value)))
    elif how == 5 and isinstance(value, str) and value:
        at = chance.randrange(len(value))
        node[key] = value[:at] + chance.choice(("", "x", "/", "..", "\0", value[at].swapcase())) + value[at + 1 :]
    else:
        node[key] = chance.choice(HOSTILE)
    return tree


# --- configurations --------------------------------------------------------------------------------------------------


def mutate_config(chance: random.Random, folder: Path) -> list[str]:
    """Write ``folder/recipe.yaml``; returns overrides to go with it."""
    text, keys = chance.choice(_sources()), _keys()
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        lines = text.splitlines(keepends=True) or [""]
        at, how = chance.randrange(len(lines)), chance.randrange(6)
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, chance.choice(lines))
        elif how == 2:
            lines[at] = chance.choice(("", " ", "  ", "\t", "- ", "    ")) + lines[at].lstrip(" ")
        elif how == 3:
            lines[at] = lines[at].partition(":")[0] + ": " + _value(chance) + "\n"
        elif how == 4:
            lines.insert(at, f"{chance.choice(keys).split('.')[0]}: {_value(chance)}\n")
        elif how == 5:
            cut = chance.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + chance.choice(_YAML) + lines[at][cut:]
        text = "".join(lines)
    content = text.encode(errors="surrogatepass")
    if chance.random() < 0.3:
        content = mutate_bytes(chance, content)
    (folder / "recipe.yaml").write_bytes(content)
    some = [*keys, "a.b.c", "", ".", "train", "train.", ".steps", "seed.x", "é"]
    return [f"{chance.choice(some)}{chance.choice('===:')}{_value(chance)}" for _ in range(chance.choice((0, 0, 1, 3)))]


def _value(chance: random.Random) -> str:
    return chance.choice(
        (chance.choice(_YAML), json.dumps(chance.choice(HOSTILE)), json.dumps(chance.choice(_defaults())))
    )


# The same for every mutant, and slow to make.


@cache
def _sources() -> list[str]:
    return [*map(text_of, recipe_names()), dump_yaml(RunConfig())]


@cache
def _keys() -> list[str]:
    return [row.key for row in describe_options()]


@cache
def _defaults() -> list[Any]:
    return [value for value in flatten(RunConfig().model_dump()).values() if not isinstance(value, dict)]


def judge_config(folder: Path, overrides: list[str]) -> str:
    os.chdir(folder)
    try:
        config = load_config("./recipe.yaml", overrides)
    except HvdtrainError as error:
        return _refused(error) if not (folder / "PWNED").exists() else "wrong: it ran"
    found, expected = flatten(config.model_dump()), flatten(RunConfig().model_dump())
    plain = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")) or {}
    for override in overrides:
        key, _, text = override.partition("=")
        _put(plain, key.split("."), yaml.safe_load(text))
    if (preset := plain.get("model", {}).get("preset")) in PRESETS:
        expected |= {f"model.{key}": value for key, value in PRESETS[preset].items()}
    expected |= {key: value for key, value in flatten(plain).items() if value != {} or key in expected}
    if expected.get("data.mixture") == {} and any(key.startswith("data.mixture.") for key in found):
        del expected["data.mixture"]
    for key in {*found, *expected}:
        if not _same(found.get(key), expected.get(key)):
            return f"wrong: {key} is {found.get(key)!r} instead of {expected.get(key)!r}"
    if make_config(yaml.safe_load(dump_yaml(config)), "again") != config:
        return "wrong: written and read again, it is another"
    try:
        sized = sizing.sized(config, 2)
        sizing.scaled(config, 2, 100_000)
        sizing.feed_of(sized, 0, 2)
    except HvdtrainError as error:
        return _refused(error)
    return RIGHT


def _put(tree: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
    tree[keys[-1]] = value


def _same(found: Any, expected: Any) -> bool:
    """Plain YAML reads 1e-3 as text."""
    if isinstance(found, float) and isinstance(expected, str):
        return found == float(expected.replace("_", ""))
    return found == expected and isinstance(found, bool) == isinstance(expected, bool)


# --- shards ----------------------------------------------------------------------------------------------------------

_TASKS = {"text": "lm", "pairs": "seq2seq", "labels": "classify"}
_SPECIAL = {"bos": 1, "eos": 2, "pad": 0, "cls": 3, "sep": 4}


def write_sound_corpora(folder: Path) -> None:
    """One folder of each kind, with tokens, offsets and labels of 40 texts; one more that is stored in chunks."""
    one, two = ([random_tokens(5 + seed % 7, seed=seed) for seed in range(first, first + 40)] for first in (0, 40))
    rows = {
        "text": [documents(texts) for texts in (one, two)],
        "pairs": [pairs(list(zip(texts, reversed(texts), strict=True))) for texts in (one, two)],
        "labels": [labelled([(text, number % 3) for number, text in enumerate(texts)]) for texts in (one, two)],
        "qa": [
            {
                **documents(texts),
                "spans": np.array([[number % 3, 3] for number in range(40)]),
                "examples": np.arange(40),
            }
            for texts in (one, two)
        ],
    }
    for kind, shards in rows.items():
        names = {"label_names": ("a", "b", "c")} if kind == "labels" else {}
        splits = {"train": shards, "val": shards[:1]}
        write_corpus(folder / kind, splits, kind=kind, special_tokens=_SPECIAL, **names)
    shutil.copytree(folder / "text", folder / "chunked")
    rewrite(folder / "chunked/train-00001.h5", chunk=16, compression="gzip")
    seal(folder / "chunked")


def mutate_shards(chance: random.Random, sound: Path, folder: Path) -> tuple[str, bool]:
    """A corpus of ``sound`` in ``folder``, changed. Returns which, and whether the digests were made to fit."""
    name = chance.choice(sorted(path.name for path in sound.iterdir()))
    shutil.copytree(sound / name, folder / "corpus")
    folder = folder / "corpus"
    shard, other = folder / "train-00001.h5", folder / "train-00000.h5"
    how = chance.choice(
        ("bytes", "bytes", "sealed bytes", "sealed bytes", "manifest", "manifest bytes", "file", "tokenizer")
    )
    if how.endswith("bytes") and "manifest" not in how:
        shard.write_bytes(mutate_bytes(chance, shard.read_bytes()))
        if how == "sealed bytes" and shard.stat().st_size:
            seal(folder)
            return name, True
    elif how == "manifest":
        path = folder / "manifest.json"
        path.write_text(json.dumps(mutate_tree(chance, json.loads(path.read_text()))))
    elif how == "manifest bytes":
        path = folder / "manifest.json"
        path.write_bytes(mutate_bytes(chance, path.read_bytes()))
    elif how == "tokenizer":
        path = folder / "tokenizer.json"
        path.write_bytes(mutate_bytes(chance, path.read_bytes()))
    else:
        deed = chance.randrange(5)
        if deed == 0:
            shard.unlink()
        elif deed == 1:
            shard.write_bytes(other.read_bytes() + b"\0")
        elif deed == 2:
            shard.rename(folder / "x")
            other.rename(shard)
            (folder / "x").rename(other)
        elif deed == 3:
            shard.unlink()
            shard.symlink_to(chance.choice(("train-00001.h5", "/dev/zero", "/etc/passwd", "..")))
        else:
            shutil.copy(other, folder / "train-00002.h5")
    return name, False


def judge_shards(sound: Path, folder: Path, is_sealed: bool) -> str:
    """All that a run does with its data before the first step, and two steps; twice, the second time without a look at
    the digests, when it may see other numbers but must not break.
    """
    os.chdir(folder)
    try:
        corpora = open_corpora(DataOptions(dir="corpus"))
        check_corpora(corpora, 0, 1, 1)
        verdict = _right_shards(sound, folder / "corpus", is_sealed)
    except HvdtrainError as error:
        verdict = _refused(error)
    if verdict in (RIGHT, REFUSED):
        try:
            _use(DataOptions(dir="corpus", verify="sizes"))
        except HvdtrainError as error:
            verdict = _refused(error) if verdict == REFUSED else f"wrong: checked, and then: {error}"
    return verdict


def _right_shards(sound: Path, folder: Path, is_sealed: bool) -> str:
    (_, manifest), (_, whole) = (open_corpora(DataOptions(dir=str(path))).entries[0] for path in (folder, sound))
    if not is_sealed and replace(manifest, source={}) != replace(whole, source={}):
        return f"wrong: another manifest: {asdict(manifest)}"
    for info in manifest.shards:
        datasets = map_shard(folder, info, manifest)
        with h5py.File((folder if is_sealed else sound) / info.file) as file:
            for name in expected_datasets(info, manifest):
                values = datasets[name]
                if not np.array_equal(values[0 : len(values)], file[name][()]):
                    return f"wrong: other numbers in /{name} of {info.file}"
    return RIGHT


def _use(options: DataOptions) -> None:
    corpora = open_corpora(options)
    if corpora.manifest.kind not in _TASKS:
        return
    task, feed = make_task(TaskOptions(name=_TASKS[corpora.manifest.kind])), Feed(16, seed=1, global_batch=4)
    task.check(corpora, feed)
    training = task.open_training(corpora, feed)
    for batch in task.open_evaluation(corpora, "val", feed, 4)():
        assert batch is not None
    loader = TrainLoader(training.source, CPU)
    for _ in range(2):
        loader.next_step()
    loader.close()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _parts() -> tuple[torch.nn.Module, torch.optim.Optimizer, Ema]:
    model = tiny_decoder(seed=1)
    optimizer = make_optimizer(model.parameters(), OptimOptions())
    return model, optimizer, Ema(whole_slices(model, LocalGroup()), EmaOptions(decay=0.9))


def write_sound_run(folder: Path) -> None:
    """A run folder with the checkpoint of step 7 in two parts: parameters, optimizer state, averages, some of them cut
    in two; all manifest fields that there are.
    """
    model, optimizer, ema = _parts()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ema.update(1)
    progress = Progress(
        7, 84, 1000, 2**64 - 3, 1.5, {"seed": 1, "a": "b"}, 2, {"torch": "2"}, None, (8.0, 3), (1.0, 2.0), (1.0,) * 7
    )
    state = state_of(model, optimizer, ema)
    on_ranks(
        2, lambda group: writer.save(folder, [_half(piece, group.rank) for piece in state], progress, group, KEEP_ALL)
    )


def _half(piece: Slice, rank: int) -> Slice:
    """Of an embedding, the rank's columns; of a bias of more than one number, its half; else all of it."""
    dim = {"embedding.weight": 1, "out.bias": 0}.get(".".join(piece.name.rsplit(".", 2)[-2:]))
    if dim is None or piece.tensor.dim() <= dim:
        return piece
    half = piece.whole[dim] // 2
    offset, shape = [0] * len(piece.whole), list(piece.whole)
    offset[dim], shape[dim] = rank * half, half
    return replace(
        piece, tensor=piece.tensor.narrow(dim, rank * half, half), places=(Rect(tuple(offset), tuple(shape)),)
    )


def mutate_checkpoint(chance: random.Random, sound: Path, run_dir: Path) -> bool:
    """A copy of ``sound`` in ``run_dir``, changed. Returns whether the digests were made to fit."""
    shutil.copytree(sound, run_dir, dirs_exist_ok=True)
    folder = folder_of(run_dir, 7)
    manifest = folder / "manifest.json"
    part = folder / f"part-{chance.randrange(2):05d}-of-00002.safetensors"
    how = chance.choice(
        (
            "bytes",
            "manifest",
            "manifest bytes",
            "sealed manifest",
            "sealed tensors",
            "sealed header",
            "sealed bytes",
            "file",
        )
    )
    if how == "bytes" or how == "sealed bytes":
        part.write_bytes(mutate_bytes(chance, part.read_bytes()))
    elif how in ("manifest", "sealed manifest"):
        manifest.write_text(json.dumps(mutate_tree(chance, json.loads(manifest.read_text()))))
    elif how == "manifest bytes":
        manifest.write_bytes(mutate_bytes(chance, manifest.read_bytes()))
    elif how == "sealed tensors":
        fields = json.loads(manifest.read_text())
        _change_tensors(chance, [held["tensors"] for held in fields["parts"]])
        manifest.write_text(json.dumps(fields))
    elif how == "sealed header":
        content = part.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(_other_header(chance, json.loads(content[8 : 8 + size]))).encode()
        part.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    else:
        deed = chance.randrange(5)
        away = run_dir / "away"
        if deed == 0:
            part.unlink()
        elif deed == 1:  # a link to the very file
            part.rename(away)
            part.symlink_to(away)
        elif deed == 2:
            part.unlink()
            part.symlink_to(chance.choice(("/dev/zero", "/etc/passwd", part.name, "..")))
        elif deed == 3:
            manifest.rename(away)
            manifest.symlink_to(away)
        else:
            manifest.write_bytes(part.read_bytes())
    if not how.startswith("sealed"):
        return False
    return _seal(folder)


def _change_tensors(chance: random.Random, parts: list[dict[str, str]]) -> None:
    """What the manifest says of one piece: its place, its type, its shape, which part it is in."""
    held, other = chance.sample(parts, 2)
    key = chance.choice(sorted(key for key in held if "[" in key or chance.random() < 0.1) or sorted(held))
    how = chance.choice(("key", "key", "kind", "move", "copy", "drop", "name"))
    if how == "key":
        held[_other_number(chance, key)] = held.pop(key)
    elif how == "kind":
        held[key] = _other_number(chance, held[key])
    elif how == "move":
        other[key] = held.pop(key)
    elif how == "copy":
        other[key] = held[key]
    elif how == "drop":
        del held[key]
    else:
        held[chance.choice(("../" + key, key + "[0:1]", key.partition("[")[0], "model.x", "", "[]"))] = held.pop(key)


def _other_number(chance: random.Random, text: str) -> str:
    numbers = list(re.finditer("-?[0-9]+", text))
    if not numbers:
        return text + "[0:1]"
    found = chance.choice(numbers)
    number = int(found[0])
    new = chance.choice(
        (number + 1, number - 1, -number, 2 * number, 0, 1, 1 << 31, 1 << 63, 10**30, "", "x", "9" * 5000)
    )
    return f"{text[: found.start()]}{new}{text[found.end() :]}"


def _other_header(chance: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """Also of the kinds that safetensors knows and torch, or the model, does not."""
    if chance.random() < 0.5:
        return mutate_tree(chance, header)
    name = chance.choice(sorted(name for name in header if name != "__metadata__"))
    kinds = ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "F6_E2M3", "C64", "U16", "I16", "F32")
    change = chance.choice(("dtype", "shape", "name", "twice"))
    if change == "dtype":
        header[name]["dtype"] = chance.choice(kinds)
    elif change == "shape":
        shape = header[name]["shape"]
        header[name]["shape"] = chance.choice(
            (shape[::-1], [1, *shape], [*shape, 0], [2**32, 2**32], [int(np.prod(shape))])
        )
    elif change == "name":
        header[chance.choice((name + "x", "model.x", "ema_began", "optimizer.x.y", ""))] = header.pop(name)
    else:
        header[name + "2"] = header[name]
    return header


def _seal(folder: Path) -> bool:
    """Make all digests fit; returns whether that could be done."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    try:
        for number, part in enumerate(fields["parts"]):
            file = folder / f"part-{number:05d}-of-00002.safetensors"
            if part["file"] == file.name:
                part |= {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
        fields.pop("manifest_sha256", None)
        path.write_text(json.dumps({**fields, "manifest_sha256": fields_sha256(fields)}))
    except (OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def judge_checkpoint(sound: Path, run_dir: Path, is_sealed: bool) -> str:
    os.chdir(run_dir)
    try:
        found = newest_valid(run_dir, LocalGroup())
        if found is None:
            return REFUSED
        model, optimizer, ema = _parts()
        load(found[0], whole_slices(model, LocalGroup()), optimizer, ema)
    except HvdtrainError as error:
        return _refused(error)
    folder, progress, _ = found
    source = folder if is_sealed else folder_of(sound, 7)
    fields = json.loads((source / "manifest.json").read_text())
    told = {**asdict(progress), "fingerprint": f"{progress.fingerprint:016x}"}
    for key, value in fields.items():
        if key not in ("format", "parts", "manifest_sha256") and json.loads(json.dumps(told[key])) != value:
            if key == "fingerprint" and int(value, 16) == progress.fingerprint:
                continue
            return f"wrong: {key} is {told[key]!r} instead of {value!r}"
    tensors = {piece.name: piece.tensor for piece in state_of(model, optimizer, ema)}
    unseen = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in tensors.items()}
    for part in fields["parts"]:
        with safe_open(source / part["file"], "pt") as file:
            for key in part["tensors"]:
                name, _, place = key.partition("[")
                index = tuple(slice(*map(int, ends.split(":"))) for ends in place.rstrip("]").split(",") if ends)
                if name in tensors and not _equal(tensors[name][index], file.get_tensor(key)):
                    return f"wrong: other numbers in {key}"
                if name in tensors:
                    unseen[name][index] = False
    missing = [name for name, places in unseen.items() if name.startswith("model.") and places.any()]
    return f"wrong: {missing} come from nowhere" if missing else RIGHT


def _equal(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the bit, also where they are no numbers."""
    return found.dtype == expected.dtype and found.numpy().tobytes() == expected.numpy().tobytes()
