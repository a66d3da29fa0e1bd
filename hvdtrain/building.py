"""Makes what an open run walks with.

open_engine   model, optimizer, update, sync; a checkpoint's tensors in them
open_loader   the batches, from where the run begins
open_log      what the run says of itself
"""

import socket
from functools import partial

import torch

from hvdtrain.checkpoint import writer
from hvdtrain.checkpoint.origin import Beginner, TakenOver, merged, take_over
from hvdtrain.checkpoint.reader import load, load_kept
from hvdtrain.checkpoint.retention import folder_of
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.cut import Making, make_replica
from hvdtrain.cut.blueprint import Blueprint, fill_slices
from hvdtrain.cut.compiling import CompileClock
from hvdtrain.cut.cut import Replica
from hvdtrain.cut.precision import PRECISIONS
from hvdtrain.data.loader import TrainLoader
from hvdtrain.data.tickets import TicketLoader
from hvdtrain.engine import Engine, scores_of
from hvdtrain.errors import say
from hvdtrain.files import write_json
from hvdtrain.machine.matmul import has_fast_bf16
from hvdtrain.machine.peaks import Peak, find_peak
from hvdtrain.models.depth import rate_shares
from hvdtrain.models.matrices import block_matrices
from hvdtrain.opening import OpenRun, make_model
from hvdtrain.optim.ema import make_ema
from hvdtrain.optim.guard import Guard
from hvdtrain.optim.loss_scale import LossScale
from hvdtrain.optim.optimizer import make_optimizer
from hvdtrain.optim.update import Update
from hvdtrain.sync import make_sync
from hvdtrain.sync.apart import Course
from hvdtrain.sync.async_server import AsyncServerSync
from hvdtrain.sync.matrices import make_matrices
from hvdtrain.sync.sync import Sync
from hvdtrain.watch.balance import Balance
from hvdtrain.watch.log import Log
from hvdtrain.watch.meter import StepClock
from hvdtrain.watch.metrics import Metrics
from hvdtrain.watch.phases import Phases
from hvdtrain.watch.profiler import Profiler, parse_steps
from hvdtrain.watch.stragglers import Stragglers
from hvdtrain.watch.watchdog import Watchdog


def open_engine(run: OpenRun) -> Engine:
    """The model, all that moves it, and a checkpoint's numbers in them (collective)."""
    config, mesh, start = run.config, run.mesh, run.start
    blueprint = mesh.world.together(lambda: Blueprint(partial(make_model, config, run.task, run.data)))
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
