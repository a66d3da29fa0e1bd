"""ZeRO's stages against an all-reduce of whole gradients: whole training steps, the ways in turn in one job.

    make bench BENCH=zero          STEPS=10 ROUNDS=3 choose

state   of the optimizer on rank 0, as a share of the all-reduce's
"""

import json
import os
import statistics
import sys
import time

LAYERS, WIDTH, HEADS, WORDS, ROWS, CONTEXT, MICROBATCHES = 6, 384, 6, 8192, 4, 256, 2
STEPS, ROUNDS = (int(os.environ.get(name, most)) for name, most in (("STEPS", 6), ("ROUNDS", 3)))
WAYS = {"all-reduce": {}, "ZeRO-1": {"stage": 1}, "ZeRO-2": {"stage": 2}}


def measure(precision: str) -> None:
    """On each rank; rank 0 prints of each way the seconds of its steps and the bytes of the optimizer's state."""
    import torch

    from hvdtrain.comm.mesh import MeshOptions, make_mesh
    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.world import detect_world
    from hvdtrain.cut import Making, make_replica
    from hvdtrain.cut.blueprint import Blueprint, fill_slices
    from hvdtrain.cut.options import CutOptions
    from hvdtrain.cut.precision import PRECISIONS
    from hvdtrain.data.batch import Batch
    from hvdtrain.engine import Engine
    from hvdtrain.machine.matmul import use_fast_matmul
    from hvdtrain.models.decoder import Decoder
    from hvdtrain.models.options import TransformerOptions
    from hvdtrain.optim.guard import Guard, GuardOptions
    from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
    from hvdtrain.optim.update import Update
    from hvdtrain.sync import SyncOptions, make_sync
    from hvdtrain.sync.zero import ZeroOptions
    from hvdtrain.tasks.lm import LanguageModel

    torch.set_num_threads(1)
    use_fast_matmul(precision)
    task, cpu = LanguageModel(), torch.device("cpu")
    sizes = TransformerOptions(layers=LAYERS, width=WIDTH, heads=HEADS, context=CONTEXT)
    with open_group(detect_world()) as group:
        mesh = make_mesh(group, MeshOptions())

        def make_engine(zero: dict[str, int]) -> tuple[Engine, torch.optim.Optimizer]:
            blueprint = Blueprint(lambda: Decoder(sizes, WORDS))
            replica = make_replica(blueprint, Making(mesh, PRECISIONS[precision], cpu, task, CutOptions()))
            fill_slices(replica.slices, blueprint.initial(0))
            how = SyncOptions(name="zero", zero=ZeroOptions(**zero)) if zero else SyncOptions()
            sync = make_sync(how, replica.slices, replica.computing, mesh, replica.uses)
            optimizer = make_optimizer([piece.tensor for piece in sync.moves], OptimOptions(), sync.norms)
            update = Update(optimizer, 1.0, Guard(GuardOptions(), cpu), None)
            return Engine(replica, sync, update, mesh, seed=1), optimizer

        made = {way: make_engine(zero) for way, zero in WAYS.items()}
        generator = torch.Generator().manual_seed(group.rank)
        windows = torch.randint(WORDS, (MICROBATCHES, ROWS, CONTEXT + 1), generator=generator)
        batches = [Batch(one[:, :-1].contiguous(), one[:, 1:].contiguous(), ROWS * CONTEXT) for one in windows]
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(1, STEPS + 2):
            for way, (engine, _) in made.items():
                group.barrier()
                started = time.perf_counter()
                engine.forward_backward(batches, task, number)
                engine.finish()
                engine.step(1e-4, number)
                group.barrier()
                if number > 1:  # the first allocates
                    seconds[way].append(time.perf_counter() - started)
        state = {
            way: sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.dim())
            for way, (_, optimizer) in made.items()
        }
        if group.rank == 0:
            print(json.dumps({"seconds": seconds, "state": state}), flush=True)


def main() -> None:
    from running import run
    from table import write

    rows = []
    for precision in ("fp32", "bf16"):
        for ranks in (2, 4):
            launcher = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
            found = [
                json.loads(run([*launcher, sys.executable, __file__, precision], threads=1)[1].strip().splitlines()[-1])
                for _ in range(ROUNDS)
            ]
            of_round = [{way: statistics.median(times) for way, times in one["seconds"].items()} for one in found]
            for way in WAYS:
                tokens = ranks * MICROBATCHES * ROWS * CONTEXT / statistics.median(one[way] for one in of_round)
                ratios = sorted(one["all-reduce"] / one[way] for one in of_round)
                state = found[0]["state"]
                spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
                share = f"{state[way] / state['all-reduce']:.4f}"
                rows.append([precision, str(ranks), way, f"{tokens:,.0f}", spread, share])
                print(rows[-1], flush=True)
    note = (
        f"Whole training steps of a decoder, {LAYERS} x {WIDTH}, vocabulary {WORDS:,}, context {CONTEXT}: "
        f"{MICROBATCHES} microbatches of {ROWS} rows a rank, AdamW, clipping, ranks of one thread in memory. Medians "
        f"of {ROUNDS} jobs of {STEPS} steps, the ways in turn at each step; in brackets least and most of the jobs."
    )
    head = ["precision", "ranks", "way", "tokens/s", "speed / all-reduce", "state / all-reduce"]
    print(write("zero", "Sharded optimizer state", "make bench BENCH=zero", head, rows, note))


if __name__ == "__main__":
    measure(sys.argv[1]) if sys.argv[1:] else main()
