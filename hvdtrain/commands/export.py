"""A trained run as a Hugging Face folder, which ``transformers`` loads with equal logits.

    OUT/config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json, ...

See models/hf/ for the families and what each of them can say.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import nn

from hvdtrain.checkpoint.parameters import Parameters, without_adapters
from hvdtrain.checkpoint.reader import Checkpoint, Weights
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.world import World
from hvdtrain.data.shards import target_begin
from hvdtrain.errors import ConfigError, OutputError
from hvdtrain.files import listed, make_folder, move_folder
from hvdtrain.models.frozen import freeze
from hvdtrain.models.hf.adapter import write_adapter
from hvdtrain.models.hf.writing import DTYPES, Exported, Writer
from hvdtrain.models.lora import adapt
from hvdtrain.models.weightless import weightless
from hvdtrain.tasks import make_task
from hvdtrain.trained import Run, find_run

Dtype = Literal["fp32", "bf16", "fp16"]


def export(
    run_dir: Path,
    out: Path,
    world: World,
    weights: Weights | None = None,
    which: str = "newest",
    dtype: Dtype = "fp32",
    adapter: bool = False,
) -> str:
    """Write a checkpoint of the run into ``out``, and return what was done. One process.

    weights: see ``open_model``. which: see ``find_run``. dtype: of the tensors that are written.
    adapter: only what was trained beside ``model.from``, as peft loads it (always fp32); else adapters are merged.
    Padding of the vocabulary is left out. Memory: a file of tensors at a time, of 5 GB at most.

    Errors: ConfigError under several ranks, where ``out`` holds something, where no family of transformers has this
    model (it names every option that does not fit) or ``dtype`` does not hold a number; CheckpointError; OutputError,
    and then ``out`` is not there.
    """
    if world.size > 1:
        raise ConfigError(f"export works on one process; {world.launcher} started {world.size}")
    _check_free(out)
    run = find_run(run_dir, LocalGroup(), which)
    parameters = Parameters(Checkpoint(run.checkpoint), weights)
    writes, what = _write_adapter(run, parameters) if adapter else _write_model(run, parameters, dtype)
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        make_folder(partial)
        writes(partial)
        move_folder(partial, out)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"exported step {run.progress.step} ({parameters.weights}, {what} into {out}"


def _write_model(run: Run, parameters: Parameters, dtype: Dtype) -> tuple[Callable[[Path], None], str]:
    """What writes it, and what it is."""
    tensors = without_adapters(parameters, run.config.model, run.config.model.lora)
    tokenizer, writer = run.learned_from().tokenizer, Writer(_exported(run))
    return lambda folder: writer.write(folder, tensors, DTYPES[dtype], tokenizer), f"{dtype}) as {writer.architecture}"


def _write_adapter(run: Run, parameters: Parameters) -> tuple[Callable[[Path], None], str]:
    """The same of its adapters alone. Errors: ConfigError where it has none."""
    lora = run.config.model.lora
    if lora is None:
        raise ConfigError(f"--adapter: {run.dir} has no adapters (model.lora); without it all is written")
    model = _model(run)
    with weightless():
        adapt(model, run.config.model, lora)
    freeze(model, run.config.optim.freeze, lora, make_task(run.config.task).predicts_tokens)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    exported, base = _exported(run), run.config.model.from_
    return lambda folder: write_adapter(folder, exported, parameters, trained, lora, base), "fp32) for peft"


def _exported(run: Run) -> Exported:
    manifest = run.learned_from().corpora.manifest
    return Exported(
        model=type(_model(run)).__name__,
        options=run.config.model.shape,
        vocab_size=manifest.vocab_size,
        special_tokens=manifest.special_tokens,
        label_names=manifest.label_names,
        several_labels=manifest.has_several_labels,
        target_begin=target_begin(manifest.special_tokens),
    )


def _model(run: Run) -> nn.Module:
    """Without numbers, and without adapters."""
    with weightless():
        return make_task(run.config.task).make_model(run.config.model, run.learned_from().corpora.manifest)


def _check_free(out: Path) -> None:
    try:
        is_taken = os.path.lexists(out) and not (out.is_dir() and not listed(out))
    except OSError as error:
        raise OutputError(f"cannot look into {out}: {error.strerror}") from None
    if is_taken:
        raise ConfigError(f"{out} is there already, and not an empty folder; remove it, or give another --out DIR")
