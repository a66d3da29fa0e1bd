"""Opens a run: finds out on all ranks what is wrong with it, before anything is written.

open_run   configuration, device, data, lengths, where to begin
recorded   what is written once before the run and once after it: configuration, carried files, the job's record
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hvdtrain import sizing
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.origin import Origin, TakenOver, check_tokens, digest_of, open_origin
from hvdtrain.checkpoint.retention import Score, steps_saved
from hvdtrain.checkpoint.start import find_start, moved_rate
from hvdtrain.comm.group import Group
from hvdtrain.comm.mesh import Mesh, make_mesh
from hvdtrain.comm.world import World
from hvdtrain.config import RunConfig, dump_yaml, flatten
from hvdtrain.cut.combinations import check_combination, notes_on_sync
from hvdtrain.cut.compiling import check_compiler
from hvdtrain.cut.stages import Stage, make_stages
from hvdtrain.data.carried import carry
from hvdtrain.data.corpora import Corpora, check_corpora, open_corpora, stage
from hvdtrain.data.loader import WithoutRows
from hvdtrain.data.stream import read_through_note
from hvdtrain.errors import EXIT_OK, CheckpointError, ConfigError, crash_code, say
from hvdtrain.files import write_text
from hvdtrain.jobs.claim import Claim
from hvdtrain.jobs.job_record import close_job, record_job
from hvdtrain.jobs.slurm import read_object
from hvdtrain.machine.cores import Cores, take_cores
from hvdtrain.machine.device import pick_device
from hvdtrain.machine.malloc import keep_freed_memory
from hvdtrain.machine.matmul import use_fast_matmul, use_tf32
from hvdtrain.models.frozen import freeze
from hvdtrain.models.lora import adapt
from hvdtrain.models.pieces import Staged
from hvdtrain.models.recompute import use_recompute
from hvdtrain.models.weightless import weightless
from hvdtrain.optim.scaling import Scaled
from hvdtrain.optim.schedules import learning_rate
from hvdtrain.sync import check_sync, notes_on_topology
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import Evaluation, Task, Training
from hvdtrain.version import versions
from hvdtrain.watch.stopping import Stopping, StopSignals


@dataclass(frozen=True)
class Asked:
    """What the user asks for. words: the recipe and its key=value. resume, timeline: see ``train``."""

    words: Sequence[str]
    recipe: RunConfig
    run_dir: Path
    resume: str
    timeline: Path | None = None


@dataclass(frozen=True)
class Data:
    """What a rank reads: checked, opened."""

    corpora: Corpora
    train: Training
    val: Evaluation


@dataclass(frozen=True)
class Start:
    """Where a run begins: after which progress, from which checkpoint (None: step 0).

    finished: the summary of a run that has nothing left to do. origin: where the weights of step 0 come from; None:
    they are random, or the run goes on.
    """

    progress: Progress
    checkpoint: Path | None
    finished: Mapping[str, Any] | None = None
    origin: Origin | None = None


@dataclass
class OpenRun:
    """A run that can begin. ``config``: the recipe with all that depends on ranks and data worked out.

    notes: what the user must be told, and the summary keeps. stages: of a pipeline. taken_over: what it has of where it
    begins. step, end: how far it has come, and how it ended: exit code and reason.
    """

    asked: Asked
    config: RunConfig
    world: World
    mesh: Mesh
    claim: Claim
    stopping: Stopping
    device: torch.device
    cores: Cores
    matmul: str
    task: Task
    data: Data
    scaled: Scaled
    identity: Mapping[str, Any]
    start: Start
    notes: list[str]
    stages: Sequence[Stage] = ()
    taken_over: TakenOver | None = None
    step: int = 0
    end: tuple[int, str] = (EXIT_OK, "finished")

    @property
    def run_dir(self) -> Path:
        return self.asked.run_dir

    @property
    def is_main(self) -> bool:
        return self.mesh.world.rank == 0

    @property
    def last(self) -> int:
        """The last step."""
        return self.config.train.steps

    @property
    def steps_left(self) -> range:
        return range(self.start.progress.step + 1, self.last + 1)

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint says of the run beside its progress."""
        return {"identity": self.identity, "run_steps": self.last, "versions": versions()}

    def score(self, scores: Mapping[str, float]) -> Score:
        """Of an evaluation, what ``checkpoint.keep_best`` goes by."""
        name = self.config.checkpoint.best
        return Score(name, scores[name], self.task.directions()[name])

    def lr(self, step: int) -> float:
        return learning_rate(self.config.schedule, self.config.optim.lr, self.last, step - 1)


def open_run(asked: Asked, world: World, group: Group, claim: Claim, signals: StopSignals | None) -> OpenRun:
    """Everything that can be wrong with the input is found here, on all ranks, before the first step (collective)."""
    recipe, run_dir = asked.recipe, asked.run_dir
    settings = flatten(recipe.model_dump())
    group.together(lambda: check_combination(settings))
    device, notes = group.together(lambda: pick_device(recipe.device, world, group))
    group.together(lambda: recipe.replicas_of(group.size))
    mesh, is_main = make_mesh(group, recipe.mesh, device, recipe.sync.servers), group.rank == 0
    config = group.together(lambda: sizing.sized(recipe, mesh.replicas))
    stopping = group.together(lambda: Stopping(run_dir, config.stop, is_main, signals))
    cores = take_cores(group)
    torch.set_num_threads(cores.threads)
    task = make_task(config.task)
    group.together(lambda: _check_best(config.checkpoint.best, task))
    notes += stopping.notes + notes_on_sync(settings) + notes_on_topology(config.sync, world)
    data = _open_data(config, task, mesh, world, pin=device.type == "cuda")
    notes += group.together(lambda: read_through_note(data.train.source.read_through))
    scaled = group.together(
        lambda: sizing.scaled(recipe, mesh.replicas, sizing.epoch_tokens_of(config, data.train.source))
    )
    notes += scaled.notes
    config = sizing.resolved(recipe, scaled)
    group.together(lambda: check_sync(config.sync, mesh.replicas, config.train.steps, group.backend))
    group.together(lambda: check_compiler(config.compile, device))
    use_tf32(config.tf32)
    matmul = "cuBLAS"
    if device.type == "cpu":
        keep_freed_memory()
        matmul = use_fast_matmul(config.precision)
    stages = group.together(lambda: _make_stages(config, task, data, mesh.pipe.size))
    origin = None
    if config.model.from_ and not config.model.from_digest:  # one that goes on knows it
        origin, digest = _open_origin(config, data.corpora, group, notes)
        asked, config = replace(asked, recipe=_pinned(recipe, digest)), _pinned(config, digest)
    identity = {**config.identity(), **data.corpora.identity()}
    start, found = _find_start(asked, config, identity, group, claim)
    if start.checkpoint is None and config.model.from_:
        start = replace(start, origin=origin or _open_origin(config, data.corpora, group, notes)[0])
    notes += found + moved_rate(start.progress, config.schedule, config.optim.lr, config.train.steps)
    if (timeline := asked.timeline) is not None:
        notes += group.together(lambda: group.start_timeline(timeline))
    return OpenRun(
        asked, config, world, mesh, claim, stopping, device, cores, matmul, task, data, scaled, identity, start, notes,
        stages, step=start.progress.step,
    )  # fmt: skip


def _make_stages(config: RunConfig, task: Task, data: Data, ranks: int) -> list[Stage]:
    """Of a pipeline over so many ranks. Errors: ConfigError where the model has fewer pieces."""
    if ranks == 1:
        return []
    with weightless():
        model = make_model(config, task, data)
    return make_stages(model, task, ranks, config.cut.stages_per_rank)


def make_model(config: RunConfig, task: Task, data: Data) -> Staged:
    """Whole, without weights. Errors: ConfigError for options that do not fit it."""
    model: Staged = task.make_model(config.model, data.corpora.manifest)
    adapt(model, config.model, config.model.lora)
    freeze(model, config.optim.freeze, config.model.lora, task.predicts_tokens)
    use_recompute(model, config.recompute)
    return model


def _check_best(name: str, task: Task) -> None:
    """Errors: ConfigError where the task, as it is set, has no such score to choose by."""
    if name not in (known := task.directions()):
        raise ConfigError(
            f"checkpoint.best={name} is no score of task.name={task.name} as it is set; there are: {', '.join(known)}"
        )


def _open_data(config: RunConfig, task: Task, mesh: Mesh, world: World, pin: bool) -> Data:
    """Find out what is wrong with the data now, on all ranks, and open what is right (collective)."""
    group, number = mesh.world, mesh.number if mesh.has_rows else 0
    feed = group.together(lambda: sizing.feed_of(config, number, mesh.replicas, pin))
    corpora = group.together(lambda: open_corpora(config.data))
    group.agree(corpora.data_digest, f"the data in {corpora.names}")
    group.together(lambda: task.check(corpora, feed))
    sharing = group.rank, group.size
    if config.data.stage:
        corpora = stage(corpora, Path(config.data.stage), world.local_rank == 0, group.together)
        sharing = world.local_rank, world.local_size  # each node has a copy of its own
    if config.data.verify == "full":
        group.together(lambda: check_corpora(corpora, *sharing, torch.get_num_threads()))

    def open_splits() -> Data:
        train, val = task.open_training(corpora, feed), task.open_evaluation(corpora, "val", feed, config.eval.rows)
        if not mesh.has_rows:
            train, val = (
                replace(train, source=WithoutRows(train.source)),
                replace(val, batches=lambda: iter(()), count=0),
            )
        return Data(corpora, train, val)

    return group.together(open_splits)


def _open_origin(config: RunConfig, corpora: Corpora, group: Group, notes: list[str]) -> tuple[Origin, str]:
    """What ``model.from`` names, and its digest (collective). notes: gets what has to be said about it.

    Errors: on all ranks; DataError where the shards are of another tokenizer, CheckpointError where it is damaged or
    not what ``model.from_digest`` says.
    """
    model, shards, known = config.model, corpora.entries[0][0], corpora.manifest.tokenizer_sha256
    origin = group.together(lambda: open_origin(Path(model.from_), model.from_weights))
    notes += group.on_main(lambda: check_tokens(origin, shards, known)) or []
    digest = digest_of(origin, group)

    def check() -> None:
        if model.from_digest not in ("", digest):
            raise CheckpointError(f"model.from={model.from_} holds {digest}, not model.from_digest={model.from_digest}")

    group.together(check)
    return origin, digest


def _pinned(config: RunConfig, digest: str) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"from_digest": digest})})


def _find_start(
    asked: Asked, config: RunConfig, identity: Mapping[str, Any], group: Group, claim: Claim
) -> tuple[Start, list[str]]:
    """Where to begin, and what has to be said about it (collective). From here on the run folder is this run's, unless
    nothing is left to do in it.
    """
    run_dir, resume = asked.run_dir, asked.resume

    def find(is_owner: bool) -> tuple[Start, list[str]]:
        progress, folder, notes = find_start(run_dir, resume, identity, group, is_owner, RunConfig().identity())
        return Start(progress, folder), notes

    def has_checkpoints() -> bool:  # as rank 0 sees it
        saved = group.together(lambda: group.rank == 0 and bool(steps_saved(run_dir)))
        return group.all_gather_object(saved)[0]

    summary = group.all_gather_object(_read_summary(run_dir))[0]
    if summary.get("step", -1) >= config.train.steps:
        start, notes = find(is_owner=False)
        if start.progress.step == summary["step"]:
            return Start(start.progress, start.checkpoint, finished=summary), notes
    found = None
    if resume not in ("auto", "never") and not has_checkpoints():
        # Another run's checkpoint is only read: one that does not fit is refused before this folder is anybody's.
        found = find(is_owner=False)
    claim.take()
    if found is None or has_checkpoints():
        found = find(is_owner=True)
    return found


def _read_summary(run_dir: Path) -> dict[str, Any]:
    """That of a run that has ended; else an empty one."""
    summary = read_object(run_dir / "summary.json")
    return summary if isinstance(summary.get("step"), int) else {}


@contextlib.contextmanager
def recorded(run: OpenRun) -> Iterator[None]:
    """Within: the run folder has the configuration and this job's record, which is closed by whatever end it takes."""
    group, corpora = run.mesh.world, run.data.corpora
    group.together(run.stopping.check_start)

    def prepare_folder() -> None:
        write_text(run.run_dir / "config.yaml", dump_yaml(run.asked.recipe))
        carry(run.run_dir, run.config.data, corpora)

    group.on_main(prepare_folder)
    folders = {str(folder): manifest.data_digest for folder, manifest in corpora.entries}
    data = {**corpora.identity(), "folders": folders, "longest_row": run.data.train.longest_row}
    folder, notes = record_job(run.run_dir, run.asked.words, group, run.world, run.config, data, run.step, run.last)
    run.notes += notes
    try:
        yield
    except BaseException as error:
        run.end = getattr(error, "exit_code", crash_code(error)), str(error)
        raise
    finally:
        for note in close_job(folder, *run.end, run.step) if run.is_main else ():
            say(f"note: {note}")
