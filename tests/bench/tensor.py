"""A decoder of width 768 whose layers are spread over two ranks of one thread, against one rank of two threads, and
against torch's DTensor over gloo on two ranks; the ways in turn.

Forward and backward alone: what a step does beside them is the same for all.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from running import RANKS

WIDTH, HEADS, LAYERS, WORDS, ROWS, CONTEXT = 768, 12, 4, 8192, 4, 256
ROUNDS, PASSES = 5, 4
WAYS = {  # way -> (launcher, threads of a rank)
    "one rank": ([], 2),
    "two ranks": (RANKS, 1),
    "two ranks, cut.sequence=false": (RANKS, 1),
    "DTensor": (RANKS, 1),
}
SIZES = {"layers": int(os.environ.get("LAYERS", LAYERS)), "passes": int(os.environ.get("PASSES", PASSES))}


def measure(way: str, precision: str, threads: int) -> None:
    """On each rank; rank 0 prints the seconds of each pass, and the share of them that it was in collectives."""
    import torch

    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.world import detect_world
    from hvdtrain.machine.matmul import use_fast_matmul

    torch.set_num_threads(threads)
    use_fast_matmul(precision)
    tokens = torch.randint(WORDS, (ROWS, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    with open_group(detect_world(), parts=True) as group:
        waited = [0.0]
        one_pass = (dtensor if way == "DTensor" else ours)(way, precision, group, tokens, waited)
        seconds = []
        for number in range(2 + SIZES["passes"]):
            group.barrier()
            if number <= 2:  # the first two warm up
                waited[0] = 0.0
            started = time.perf_counter()
            loss = one_pass()
            seconds.append(time.perf_counter() - started)
        if group.rank == 0:
            share = waited[0] / sum(seconds[2:])
            print(json.dumps({"seconds": seconds[2:], "waited": share, "loss": loss}), flush=True)


def ours(way: str, precision: str, group, tokens, waited: list[float]) -> Callable[[], float]:
    import torch

    from hvdtrain.comm.mesh import MeshOptions, make_mesh
    from hvdtrain.cut import Making, make_replica
    from hvdtrain.cut.blueprint import Blueprint, fill_slices
    from hvdtrain.cut.options import CutOptions
    from hvdtrain.cut.precision import PRECISIONS
    from hvdtrain.data.batch import Batch
    from hvdtrain.models.decoder import Decoder
    from hvdtrain.models.options import TransformerOptions
    from hvdtrain.tasks.lm import LanguageModel

    sizes = {"width": WIDTH, "heads": HEADS, "layers": SIZES["layers"], "context": CONTEXT}
    options = TransformerOptions(**sizes, positions="none", bias=False, tied=False)
    mesh = make_mesh(group, MeshOptions(tensor=group.size))
    for name in ("sum", "gather", "scatter_sum") if group.size > 1 else ():
        setattr(mesh.tensor, name, timed(getattr(mesh.tensor, name), waited))
    blueprint = Blueprint(lambda: Decoder(options, WORDS))
    cut = CutOptions(sequence="false" not in way)
    task = LanguageModel()
    replica = make_replica(blueprint, Making(mesh, PRECISIONS[precision], torch.device("cpu"), task, cut))
    fill_slices(replica.slices, blueprint.initial(0))
    replica.publish()
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ROWS * CONTEXT)

    def one_pass() -> float:
        passed = replica.forward_backward([batch], task, 1, None)
        for parameter in replica.computing:
            parameter.grad = None
        return float(passed.loss) / batch.target_tokens

    return one_pass


def timed(collective: Callable, waited: list[float]) -> Callable:
    def called(*given):
        started = time.perf_counter()
        found = collective(*given)
        waited[0] += time.perf_counter() - started
        return found

    return called


def dtensor(way: str, precision: str, group, tokens, waited: list[float]) -> Callable[[], float]:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.tensor.parallel import loss_parallel
    from ways.dtensor_gpt import DTensorGPT, shard

    store = dist.TCPStore("127.0.0.1", 0, is_master=True) if group.rank == 0 else None
    port = group.all_gather_object(store.port if store else None)[0]
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=group.size)
    torch.manual_seed(0)
    model = DTensorGPT(WORDS, SIZES["layers"], WIDTH, HEADS)
    shard(model, group.size)

    def one_pass() -> float:
        with loss_parallel():
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
        model.zero_grad()
        return float(loss.detach().full_tensor() if hasattr(loss, "full_tensor") else loss.detach())

    return one_pass


def run(way: str, precision: str) -> dict:
    launcher, threads = WAYS[way]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    command = [*launcher, sys.executable, os.path.abspath(__file__), "--rank", way, precision, str(threads)]
    env = {**os.environ, **root, "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0"}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    from table import write

    rounds, rows = int(os.environ.get("ROUNDS", ROUNDS)), []
    for precision in ("fp32", "bf16"):
        found: dict[str, list[dict]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, results in found.items():
                results.append(run(way, precision))
        for way, results in found.items():
            seconds = [statistics.median(one["seconds"]) for one in results]
            base = [statistics.median(one["seconds"]) for one in found["one rank"]]
            ratio = statistics.median(b / s for b, s in zip(base, seconds, strict=True))
            speed = ROWS * CONTEXT / statistics.median(seconds)
            waited = statistics.median(one["waited"] for one in results)
            rows.append([precision, way, f"{speed:,.0f}", f"{ratio:.2f}", f"{waited:.1%}" if waited else ""])
            print(rows[-1], f"loss {results[0]['loss']:.4f}", flush=True)
    note = (
        f"Forward and backward of a decoder: {SIZES['layers']} layers of width {WIDTH}, {HEADS} heads, {WORDS:,} "
        f"words, {ROWS} rows of {CONTEXT} tokens. Median of {rounds} rounds of {SIZES['passes']} passes, the ways in "
        "turn. "
        "In collectives: share of a pass, waiting for the other rank included."
    )
    head = ["precision", "way", "tokens/s", "speed / one rank", "in collectives"]
    print(write("tensor", "Layers spread over two ranks", "make bench BENCH=tensor", head, rows, note))


if __name__ == "__main__":
    measure(sys.argv[2], sys.argv[3], int(sys.argv[4])) if sys.argv[1:2] == ["--rank"] else main()
