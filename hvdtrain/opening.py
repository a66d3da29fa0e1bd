"""Opens a run: finds out on all ranks what is wrong with it, and makes what the walk needs.

open_run      configuration, device, data, lengths, where to begin          nothing is written yet
open_engine   model, optimizer, update, sync; a checkpoint's tensors in them
open_loader   the batches, from where the run begins
open_log      what the run says of itself
"""

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvdtrain import sizing
from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.origin import (
    Beginner,
    Origin,
    TakenOver,
    check_tokens,
    digest_of,
    merged,
    open_origin,
    take_over,
)
from hvdtrain.checkpoint.reader import load, load_kept
from hvdtrain.checkpoint.retention import Score, folder_of, steps_saved
from hvdtrain.checkpoint.start import find_start, moved_rate
from hvdtrain.comm.group import Group
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.comm.mesh import Mesh, make_mesh
from hvdtrain.comm.world import World
from hvdtrain.config import RunConfig, dump_yaml, flatten
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint, fill_slices
from hvdtrain.cut.combinations import check_combination, notes_on_sync
from hvdtrain.cut.compiling import CompileClock, check_compiler
from hvdtrain.cut.cut import Replica
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.cut.stages import Stage, make_stages
from hvdtrain.data.carried import carry
from hvdtrain.data.corpora import Corpora, check_corpora, open_corpora, stage
from hvdtrain.data.loader import TrainLoader, WithoutRows
from hvdtrain.data.stream import read_through_note
from hvdtrain.data.tickets import TicketLoader
from hvdtrain.engine import Engine, scores_of
from hvdtrain.errors import EXIT_OK, CheckpointError, ConfigError, crash_code, say
from hvdtrain.files import write_json, write_text
from hvdtrain.jobs.claim import Claim
from hvdtrain.jobs.job_record import close_job, record_job
from hvdtrain.jobs.slurm import read_object
from hvdtrain.machine.cores import Cores, take_cores
from hvdtrain.machine.device import pick_device
from hvdtrain.machine.malloc import keep_freed_memory
from hvdtrain.machine.matmul import has_fast_bf16, use_fast_matmul, use_tf32
from hvdtrain.machine.peaks import Peak, find_peak
from hvdtrain.models.depth import rate_shares
from hvdtrain.models.frozen import freeze
from hvdtrain.models.lora import adapt
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.pieces import Staged
from hvdtrain.models.recompute import use_recompute
from hvdtrain.models.weightless import weightless
from hvdtrain.optim.ema import make_ema
from hvdtrain.optim.guard import Guard
from hvdtrain.optim.loss_scale import LossScale
from hvdtrain.optim.optimizer import make_optimizer
from hvdtrain.optim.scaling import Scaled
from hvdtrain.optim.schedules import learning_rate
from hvdtrain.optim.update import Update
from hvdtrain.sync import check_sync, make_sync, notes_on_topology
from hvdtrain.sync.apart import Course
from hvdtrain.sync.async_server import AsyncServerSync
from hvdtrain.sync.matrices import make_matrices
from hvdtrain.sync.sync import Sync
from hvdtrain.tasks import make_task
from hvdtrain.tasks.task import Evaluation, Task, Training
from hvdtrain.version import versions
from hvdtrain.watch.balance import Balance
from hvdtrain.watch.log import Log
from hvdtrain.watch.meter import StepClock
from hvdtrain.watch.metrics import Metrics
from hvdtrain.watch.phases import Phases
from hvdtrain.watch.profiler import Profiler, parse_steps
from hvdtrain.watch.stopping import Stopping, StopSignals
from hvdtrain.watch.stragglers import Stragglers
from hvdtrain.watch.watchdog import Watchdog


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
        model = _make_model(config, task, data)
    return make_stages(model, task, ranks, config.cut.stages_per_rank)


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


def open_engine(run: OpenRun) -> Engine:
    """The model, all that moves it, and a checkpoint's numbers in them (collective)."""
    config, mesh, start = run.config, run.mesh, run.start
    blueprint = mesh.world.together(lambda: Blueprint(partial(_make_model, config, run.task, run.data)))
    precision = PRECISIONS[config.precision]

    def tell(note: str) -> None:
        run.notes.append(note.removeprefix("note: "))
        say(note)

    making = Making(mesh, precision, run.device, run.task, config.cut, config.compile, tell, run.stages)
    replica = make_replica(blueprint, making)
    if start.checkpoint is None:
        fill_slices(replica.slices, blueprint.initial(config.seed))
    _take_over(run, replica, type(blueprint.model).__name__)
    sync = _make_sync(run, replica)
    optimizer = _make_optimizer(run, blueprint, sync)
    ema = make_ema(sync.moves, config.ema)
    saved = None
    if (folder := start.checkpoint) is not None:
        saved = mesh.world.together(lambda: load(folder, replica.slices, optimizer, ema, moves=sync.moves))
        if anew := mesh.world.together(lambda: load_kept(saved, sync.state())):
            more = f" and {len(anew) - 2} more" if len(anew) > 2 else ""
            run.notes.append(f"{folder} is of another sync: {', '.join(anew[:2])}{more} begin anew")
        if ema is not None and not saved.has_ema:
            run.notes.append(f"{folder} has no averaged weights: the average begins there")
    loss_scale = LossScale(run.device) if precision.scaled else None
    update = Update(optimizer, config.optim.clip_norm, Guard(config.guard, run.device), loss_scale)
    engine = Engine(replica, sync, update, mesh, config.seed, ema, start.progress)
    if saved is not None and (said := engine.take_up_own(saved)):
        run.notes.append(said)
    if ema is not None and start.origin is not None:
        ema.restart(0)  # with what the engine has handed out
    return engine


Loader = TrainLoader | TicketLoader


def open_loader(run: OpenRun, engine: Engine) -> Loader:
    """What feeds this rank's part of the steps (local)."""
    source = run.data.train.source
    if isinstance(engine.sync, AsyncServerSync):
        loader: Loader = TicketLoader(source, run.device, engine.sync)
        engine.sync.save_alone = partial(_save_alone, run, engine, loader)
    else:
        loader = TrainLoader(source, run.device)
    loader.rows_consumed = run.start.progress.rows_consumed
    return loader


def _save_alone(run: OpenRun, engine: Engine, loader: Loader, step: int, weight: float) -> None:
    """Save what this rank has, which is all there is, while others cannot be met. weight: targets that came to it."""
    alone = LocalGroup()
    engine.tokens = engine.tokens + weight
    engine.guard.check_weights(step, [piece.tensor for piece in engine.replica.slices])
    progress = engine.progress(step, loader, alone, **run.settings)
    writer.save(run.run_dir, engine.state(), progress, alone, run.config.checkpoint)
    say(f"step {step}: saved {folder_of(run.run_dir, step)}")


def _make_sync(run: OpenRun, replica: Replica) -> Sync:
    """How the replicas agree, and what has to be said about it (collective)."""

    def val_loss() -> float:
        replica.publish()
        return scores_of(replica, run.mesh.replica, run.data.val(), run.task)["val_loss"]

    course = Course(run.start.progress.step, run.last, val_loss)
    sync = make_sync(run.config.sync, replica.slices, replica.computing, run.mesh, replica.uses, course)
    run.notes += sync.notes
    return sync


def _make_optimizer(run: OpenRun, blueprint: Blueprint, sync: Sync) -> torch.optim.Optimizer:
    """Of what this rank moves (collective)."""
    options, matrices = run.config.optim, None
    if options.name == "muon":
        parts = block_matrices(blueprint.wholes, run.config.model)
        fast = has_fast_bf16(run.device)
        matrices, notes = make_matrices(sync, parts, options.muon, run.mesh, run.device, fast)
        run.notes += notes
    shares = rate_shares(list(blueprint.wholes), options.layer_decay)
    moved = [piece.tensor for piece in sync.moves]
    return make_optimizer(moved, options, sync.norms, [shares[piece.name] for piece in sync.moves], matrices)


def _make_model(config: RunConfig, task: Task, data: Data) -> Staged:
    """Whole, without weights. Errors: ConfigError for options that do not fit it."""
    model: Staged = task.make_model(config.model, data.corpora.manifest)
    adapt(model, config.model, config.model.lora)
    freeze(model, config.optim.freeze, config.model.lora, task.predicts_tokens)
    use_recompute(model, config.recompute)
    return model


def _take_over(run: OpenRun, replica: Replica, model: str) -> None:
    """Weights from ``model.from`` (collective). One replica reads them: the engine hands its weights on to the others,
    so that ranks do not all read the same files. model: the name of its class.
    """
    origin, mesh, manifest = run.start.origin, run.mesh, run.data.corpora.manifest
    if origin is None:
        return

    def take() -> TakenOver | None:
        if mesh.number:
            return None
        ours = Beginner(run.task.name, model, manifest.vocab_size, manifest.label_names)
        return take_over(origin, replica.slices, ours)

    found = mesh.own.all_gather_object(mesh.world.together(take))

    def merge() -> TakenOver | None:
        return None if mesh.number else merged(found, origin)

    run.taken_over = taken_over = mesh.world.together(merge)

    def record() -> None:
        if taken_over is not None:
            write_json(run.run_dir / "from.json", taken_over.fields(origin))

    mesh.world.on_main(record)


def open_log(run: OpenRun, engine: Engine, watchdog: Watchdog) -> tuple[Log, Peak]:
    """What the run says of itself, and what its device could do (collective)."""
    config, group, step = run.config, run.mesh.world, run.start.progress.step
    compiling = CompileClock() if config.compile != "none" else None
    group.barrier()  # ranks of a node measure at the same time: each finds its share of the machine
    peak = find_peak(config.metrics.mfu, run.device, config.precision, config.tf32)
    metrics = Metrics(run.run_dir, config.metrics, run.last, run.is_main, step, engine, run.device)
    metrics.peak = peak.flops_per_s
    balance = Balance(config.balance, run.mesh.number, run.mesh.replicas, run.device)
    metrics.reports.append(balance.report)
    profiler = Profiler(parse_steps(config.metrics.profile), run.run_dir, group.rank, run.device)
    every, factor = config.watchdog.stragglers_every, config.watchdog.straggler_factor
    stragglers = None
    if group.size > 1 and every and not config.sync.deals_rows:  # who takes rows as it can holds up nobody
        hosts = group.all_gather_object(socket.gethostname())
        stragglers = Stragglers(factor, hosts[: len(hosts) - run.mesh.servers], step)
    phases = Phases(StepClock(run.device), profiler, watchdog)
    return Log(metrics, phases, group, stragglers, every, compiling, balance), peak
