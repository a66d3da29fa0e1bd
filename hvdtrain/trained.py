"""Opens what a run left behind: a checkpoint, its model, and the data that it learned from.

    find_run     configuration, a whole checkpoint, what the folder carries of its data
    open_mesh    the ranks that are here, as replicas of its model
    open_model   the model of that checkpoint
    open_data    the run's own shards, or others that are given; told apart by digest

Only the last needs shards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.parameters import which_weights
from hvdtrain.checkpoint.reader import Checkpoint, Weights, load
from hvdtrain.checkpoint.valid import choose_valid
from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import Mesh, MeshOptions, make_mesh
from hvdtrain.comm.world import World
from hvdtrain.config import RunConfig, flatten, make_config
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint
from hvdtrain.cut.combinations import check_combination
from hvdtrain.cut.cut import Replica
from hvdtrain.cut.options import CutOptions
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.carried import Carried, read_carried
from hvdtrain.data.corpora import Corpora, folders_of, open_corpora, open_folders
from hvdtrain.errors import CheckpointError, ConfigError, DataError, plural
from hvdtrain.files import exists, read_text
from hvdtrain.machine.circles import look_at_what_comes
from hvdtrain.machine.device import pick_device
from hvdtrain.models.lora import adapt
from hvdtrain.models.pieces import Staged
from hvdtrain.strict_yaml import parse_yaml
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import check_kind


@dataclass(frozen=True)
class Run:
    """A run folder at one of its checkpoints. ``carried``: None where the run is of before folders carried anything."""

    dir: Path
    config: RunConfig
    checkpoint: Path
    progress: Progress
    carried: Carried | None

    @property
    def data_digest(self) -> str | None:
        """Of what it was trained on; None: its checkpoint does not say."""
        return (self.progress.identity or {}).get("data_digest")

    def learned_from(self) -> Carried:
        """Manifests and tokenizer of its data. Errors: DataError where the folder carries none and they are gone."""
        if self.carried is not None:
            return self.carried
        _check_there(self, folders_of(self.config.data))
        corpora = open_corpora(self.config.data)
        _check_like_the_runs(self, corpora)
        return Carried(corpora, corpora.entries[0][0] / "tokenizer.json")


@dataclass(frozen=True)
class TrainedModel:
    """A replica with its trained parameters. ``weights``: which of the checkpoint's."""

    replica: Replica
    weights: Weights

    @property
    def device(self) -> torch.device:
        return self.replica.device


def read_config(run_dir: Path) -> RunConfig:
    """The resolved configuration of a run. Errors: CheckpointError where there is none."""
    path = run_dir / "config.yaml"
    try:
        tree = parse_yaml(read_text(path), str(path))
        return make_config(tree if isinstance(tree, dict) else {}, str(path))
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir} is not a run folder: it has no config.yaml") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the run's configuration is damaged: {error}") from None


def find_run(run_dir: Path, group: Group, which: str = "newest") -> Run:
    """A run at one of its checkpoints (collective).

    which: ``newest`` (of those that are whole), ``best`` (see ``checkpoint.best``) or a step.
    Errors: on all ranks; CheckpointError where there is no checkpoint, ConfigError where one is asked for that is not
    there.
    """
    config = group.together(lambda: read_config(run_dir))
    found = choose_valid(run_dir, which, group)

    def look() -> Run:
        if found is None:
            raise CheckpointError(f"{run_dir} has no whole checkpoint yet; run `python -m hvdtrain train` to its end")
        run = Run(run_dir, config, *found, read_carried(run_dir))
        if run.carried is not None and run.carried.corpora.data_digest != run.data_digest:
            raise CheckpointError(
                f"{run_dir}/data is of other data (data_digest {run.carried.corpora.data_digest}) than "
                f"{run.checkpoint} was trained on ({run.data_digest}): the folder was put together from two runs"
            )
        return run

    return group.together(look)


def parse_mesh(text: str) -> MeshOptions | None:
    """``--mesh tensor=2,pipeline=2``; None of an empty text. Errors: ConfigError."""
    if not text:
        return None
    axes = [word.partition("=") for word in text.split(",")]
    names = [name for name, _, _ in axes]
    is_known = set(names) <= MeshOptions.model_fields.keys() and len(set(names)) == len(names)
    if not is_known or not all(size.isascii() and size.isdigit() and int(size) for _, _, size in axes):
        raise ConfigError(f"--mesh {text}: expected tensor=N,pipeline=N with N of 1 or more, or one of the two")
    return MeshOptions(**{name: int(size) for name, _, size in axes})


def open_mesh(run: Run, asked: MeshOptions | None, world: World, group: Group) -> Mesh:
    """The ranks as replicas of the run's model (collective): as ``asked``; else whole ones on one rank, or of a run
    that had whole ones; else as the run's were.

    Errors: on all ranks; ConfigError where they are not whole replicas, or the model cannot be cut so.
    """

    def choose() -> MeshOptions:
        own = run.config.mesh
        if asked is None and group.size > 1 and group.size % own.ranks:
            fit = f"1 rank, where the model fits it, or {own.ranks} or a multiple of that"
            raise ConfigError(
                f"{run.dir} was trained with mesh.tensor={own.tensor} mesh.pipeline={own.pipeline}, which "
                f"{plural(group.size, 'rank')} cannot be; start {fit}, or give --mesh tensor=N,pipeline=N"
            )
        chosen = asked or (own if group.size > 1 else MeshOptions())
        check_combination(flatten(RunConfig(model=run.config.model, mesh=chosen).model_dump()))
        return chosen

    options = group.together(choose)
    return make_mesh(group, options, group.together(lambda: pick_device(run.config.device, world, group)[0]))


def open_model(
    run: Run, corpora: Corpora, world: World, mesh: Mesh, weights: Weights | None = None, precision: str = "fp32"
) -> TrainedModel:
    """The model of that checkpoint, as the mesh cuts it (collective).

    corpora: whose manifest says how large vocabulary and labels are: the run's or, made alike, those to be read.
    weights: those of the last step (``raw``) or their average (``ema``); None: the average where there is one.
    Errors: on all ranks; ConfigError where an average is asked for that is not there.
    """
    group, config = mesh.world, run.config
    task = group.together(lambda: make_task(config.task))

    def make() -> Staged:
        model: Staged = task.make_model(config.model, corpora.manifest)
        adapt(model, config.model, config.model.lora)
        return model

    def prepare() -> tuple[Weights, Blueprint, torch.device]:
        kind = which_weights(Checkpoint(run.checkpoint), weights)
        return kind, Blueprint(make), pick_device(config.device, world, group)[0]

    kind, blueprint, device = group.together(prepare)
    replica = make_replica(blueprint, Making(mesh, PRECISIONS[precision], device, task, CutOptions()))

    def read() -> None:
        load(run.checkpoint, replica.slices, weights=kind)
        replica.publish()
        replica.answering.eval()

    group.together(read)
    look_at_what_comes()
    return TrainedModel(replica, kind)


# --- data --------------------------------------------------------------------------------------------------------


def open_data(run: Run, given: Sequence[Path], group: Group) -> Corpora:
    """The run's own shards, from where they were when it was trained, or other ones that are ``given`` (collective).

    Errors: on all ranks; DataError where they are missing or not made as the run's were, or are not the run's own and
    nobody has given them.
    """

    def look() -> Corpora:
        corpora = _open_given(run, given) if given else _open_own(run)
        _check_like_the_runs(run, corpora)
        if not given:
            _check_own(run, corpora)
        return corpora

    corpora = group.together(look)
    group.agree(corpora.data_digest, f"the data in {corpora.names}")
    return corpora


def _open_own(run: Run) -> Corpora:
    if run.carried is None:
        _check_there(run, folders_of(run.config.data))
        return open_corpora(run.config.data)
    known = run.carried.corpora
    folders = [folder for folder, _ in known.entries]
    _check_there(run, folders)
    return open_folders(folders, known.weights)


def _open_given(run: Run, given: Sequence[Path]) -> Corpora:
    """Where they are those of the run's mixture, in its order and with its weights: so they are known again."""
    corpora = open_folders(given, (1.0,) * len(given))
    known = run.carried.corpora if run.carried is not None else None
    weights = known.weights if known is not None else tuple(run.config.data.mixture.values())
    if len(weights) != len(given):
        return corpora
    order = [manifest.data_digest for _, manifest in known.entries] if known is not None else []
    place = {digest: number for number, digest in enumerate(order)}
    entries = sorted(corpora.entries, key=lambda entry: place.get(entry[1].data_digest, len(order)))
    return replace(corpora, entries=tuple(entries), weights=weights)


def _check_there(run: Run, folders: Sequence[Path]) -> None:
    for folder in folders:
        if not exists(folder / "manifest.json"):
            where = f"no shards in {folder.absolute()}, where those of {run.dir} "
            if run.carried is not None:
                raise DataError(f"{where}were when it was trained; give --data DIR")
            raise DataError(
                f"{where}should be: its config.yaml says {folder}, seen from where it was trained; "
                "start from there, or give --data DIR to evaluate"
            )


def _check_like_the_runs(run: Run, corpora: Corpora) -> None:
    check_kind(corpora, make_task(run.config.task))
    for key, value in corpora.identity().items():
        trained_on = (run.progress.identity or {}).get(key)
        if key != "data_digest" and value != trained_on:
            what = "list of labels" if "label_names" in key else "tokenizer"
            raise DataError(
                f"{corpora.names} was made with another {what} than {run.dir} "
                f"({key}: {value}, not {trained_on}); prepare it as the run's data were"
            )


def _check_own(run: Run, corpora: Corpora) -> None:
    if corpora.data_digest == run.data_digest:
        return
    names, found, known = corpora.names, corpora.data_digest, run.data_digest
    if run.carried is not None:  # then it can be said which of a mixture
        both = zip(corpora.entries, run.carried.corpora.entries, strict=True)
        changed = [(folder, new, old) for (folder, new), (_, old) in both if new.data_digest != old.data_digest]
        names = ", ".join(str(folder) for folder, _, _ in changed)
        found = ", ".join(new.data_digest for _, new, _ in changed)
        known = ", ".join(old.data_digest for _, _, old in changed)
    raise DataError(
        f"{names} holds other data than {run.dir} was trained on (data_digest {found}, not {known}): it was prepared "
        "again, or is another folder of that name; --data DIR evaluates on other data, and the result says so"
    )
