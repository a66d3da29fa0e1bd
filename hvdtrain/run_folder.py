"""Opens what a run left behind: its configuration, its data and a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hvdtrain import checkpoint
from hvdtrain.comm.device import pick_device
from hvdtrain.comm.group import Group
from hvdtrain.comm.world import World
from hvdtrain.config import RunConfig, make_config, parse_yaml
from hvdtrain.data.corpora import Corpora, DataOptions, open_corpora
from hvdtrain.errors import CheckpointError, ConfigError, DataError
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import check_kind


@dataclass(frozen=True)
class TrainedRun:
    """A model with its trained parameters, in evaluation mode on ``device``."""

    config: RunConfig
    model: nn.Module
    device: torch.device
    step: int
    weights: checkpoint.Weights  # which of the checkpoint's
    corpora: Corpora


def read_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run. Errors: CheckpointError where there is none."""
    path = run_dir / "config.yaml"
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        return make_config(tree if isinstance(tree, dict) else {}, str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.yaml") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the run's configuration is damaged: {error}") from None


def open_run(
    run_dir: Path,
    world: World,
    group: Group,
    data_dir: Path | None = None,
    weights: checkpoint.Weights | None = None,
    which: str = "newest",
) -> TrainedRun:
    """Load a checkpoint of a run (collective).

    which: ``newest`` (of those that are whole), ``best`` (by validation loss; see ``checkpoint.keep_best``) or a step.
    weights: those of the last step (``raw``) or their average (``ema``); None: the average where there is one.

    Errors: on all ranks; CheckpointError where there is no checkpoint, DataError where the data does not fit it,
    ConfigError where an average or a checkpoint is asked for that is not there.
    """
    config = group.together(lambda: read_config(run_dir))
    found = checkpoint.choose_valid(run_dir, which, group)

    def prepare() -> TrainedRun:
        if found is None:
            raise CheckpointError(f"{run_dir} has no whole checkpoint yet; run `python -m hvdtrain train` to its end")
        folder, progress = found
        has_ema = checkpoint.has_ema(folder)
        if weights == "ema" and not has_ema:
            raise ConfigError(f"{folder} has no averaged weights (ema.decay was 0); take --weights raw")
        kind: checkpoint.Weights = weights or ("ema" if has_ema else "raw")
        data = config.data if data_dir is None else DataOptions(dir=str(data_dir))
        corpora = open_corpora(data)
        task = make_task(config.task)
        check_kind(corpora, config.task.name, task.kind)
        for key, value in corpora.identity().items():
            trained_on = (progress.identity or {}).get(key)
            if key != "data_digest" and value != trained_on:
                what = "list of labels" if key == "label_names" else "tokenizer"
                raise DataError(
                    f"{corpora.names} was made with another {what} than {run_dir} "
                    f"({key}: {value}, not {trained_on}); prepare it as the run's data were"
                )
        device, _ = pick_device(config.device, world, group)
        model = task.make_model(config.model, corpora.manifest).to(device)
        checkpoint.load(folder, model, weights=kind)
        return TrainedRun(config, model.eval(), device, progress.step, kind, corpora)

    return group.together(prepare)
