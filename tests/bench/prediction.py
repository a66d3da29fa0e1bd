"""The time of a step as it is told beforehand, beside what it took: more ranks, cuts, and the best of the meshes.

make bench BENCH=prediction     PARTS=growth,cuts,meshes LINKS=memory,1gbit RECIPES=demo choose, SHORT=0.5 takes half
                                the steps; a quarter of an hour on two idle cores

growth   4 ranks from runs of 1 and 2: `hvdtrain plan --from RUN...`
cuts     a tensor cut and a pipeline on 2 ranks, of which each has a core: `plan --cluster FILE --fit --from RUN...`
meshes   the same on 4 ranks: is the mesh that the plan names first the fastest?

FILE holds what a sum over an axis takes, and how fast the link is; RUN are two plain runs of 2 or 4 ranks, with
microbatches of two sizes, for FLOPs a second and the optimizer's bytes. Nothing is taken from a run that is cut.

Two cores stand for four nodes. So that a rank has as much of them at every size, all four are busy at every size: four
runs of one rank at a time, two of two, one of four.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import table

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests")]

PARTS = os.environ.get("PARTS", "growth,cuts,meshes").split(",")
LINKS = os.environ.get("LINKS", "memory,1gbit").split(",")
SHORT = float(os.environ.get("SHORT", "1"))  # of the steps
ROUNDS = 3  # of growth
MIB = 1 << 20

RUN = ("scaling.rule=none", "scaling.base_batch=0", "schedule.warmup_steps=0", "eval.every=0", "eval.rows=4")
RUN += ("checkpoint.every=0", "metrics.tensorboard=false", 'metrics.mfu="off"', "device=cpu")


class Recipe(NamedTuple):
    """batch, rows: sequences of a step, of a microbatch. link: of the meshes of 4 ranks."""

    name: str
    batch: int
    rows: int
    steps: int
    link: str
    words: Sequence[str] = ()


RECIPES = [
    Recipe("shakespeare-char", 16, 2, 60, "memory"),
    Recipe("demo", 16, 2, 24, "memory"),
    Recipe("gpt2-124m", 8, 1, 24, "1gbit", ("model.layers=4", "model.width=384", "model.heads=6", "model.context=128")),
]
RECIPES = [recipe for recipe in RECIPES if recipe.name in os.environ.get("RECIPES", recipe.name).split(",")]
GROWING = Recipe("demo", 16, 4, 24, "")


HEAD = ["part", "recipe", "ranks", "what", "link", "told s", "took s", "told / took", ""]
COMMAND = "make bench BENCH=prediction"
TITLE = "Times of a step, told and taken"
NOTE = (
    "Seconds of a step, medians over the lines of a run's log without its first. growth: the global batch stays "
    "(strong) or grows with the ranks (weak); medians of three rounds, the spread of their ratios, and what 1, 2 and 4 "
    "ranks took in each. cuts, meshes: in brackets the ranks of tensor x pipeline; the plain run, and one of "
    "microbatches of four times as many rows, are where the figures come from. Demo's and shakespeare-char's models "
    "are the recipes', gpt2-124m has 4 layers of 384; batches are of 16, 16 and 8 rows."
)


def main() -> None:
    """Parts that are not asked for stay in the table as they were."""
    parts = {"growth": growth, "cuts": cuts, "meshes": meshes}
    asked = {(part, recipe.name) for part in PARTS for recipe in (RECIPES if part != "growth" else [GROWING])}
    rows = [row for row in table.kept("prediction", COMMAND, HEAD) if (row[0], row[1]) not in asked]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from launch import prepare

        data = prepare(folder / "prepared").shards
        for part in PARTS:
            for row in parts[part](folder / part, data):
                rows.append(row)
                print("  ".join(row), flush=True)
            rows.sort(key=lambda row: list(parts).index(row[0]))
            text = table.write("prediction", TITLE, COMMAND, HEAD, rows, NOTE)
    print(text)


# --- more ranks ---------------------------------------------------------------------------------------------------


def growth(folder: Path, data: Path) -> Iterator[list[str]]:
    """Of each size the median over ``ROUNDS``, in which the sizes take turns."""
    for kind in ("strong", "weak"):
        for link in LINKS:
            rounds = [grown(folder / f"{kind}-{link}-{number}", data, kind, link) for number in range(ROUNDS)]
            ratios = sorted(told / taken for told, taken, _ in rounds)
            told, taken = (statistics.median(one[at] for one in rounds) for at in (0, 1))
            said = f"{ratios[0]:.2f} to {ratios[-1]:.2f}; " + "; ".join(one[2] for one in rounds)
            yield ["growth", GROWING.name, "4", f"{kind}, from 1 and 2", link, *compared(told, taken), said]


def grown(folder: Path, data: Path, kind: str, link: str) -> tuple[float, float, str]:
    """Seconds of a step of 4 ranks: told, taken; and what all of the sizes took."""
    from hvdtrain.planner.measured import read_run
    from hvdtrain.planner.outlook import Asked, look_ahead

    runs: dict[int, list[Path]] = {}
    for ranks in (1, 2, 4):
        batch = GROWING.batch if kind == "strong" else GROWING.rows * ranks
        words = words_of(GROWING, data, batch)
        run_dirs = [folder / f"{ranks}-{number}" for number in range(4 // ranks)]
        with ThreadPoolExecutor(len(run_dirs)) as pool:
            list(pool.map(lambda run_dir: train(GROWING, words, run_dir, ranks, link), run_dirs))  # noqa: B023
        runs[ranks] = run_dirs
    took = {ranks: statistics.median(read_run(one).step_s for one in runs[ranks]) for ranks in runs}
    told = look_ahead(Asked(GROWING.name, words, 4, runs=[*runs[1], *runs[2]])).step_s
    return told, took[4], " ".join(f"{seconds:.3f}" for seconds in took.values())


# --- cuts and meshes ----------------------------------------------------------------------------------------------


def cuts(folder: Path, data: Path) -> Iterator[list[str]]:
    for recipe in RECIPES:
        for one in of_meshes(recipe, 2, "memory", folder / recipe.name, data):
            yield ["cuts", recipe.name, "2", one.name, "memory", *compared(one.told, one.taken), one.parts]


def meshes(folder: Path, data: Path) -> Iterator[list[str]]:
    for recipe in RECIPES:
        found = of_meshes(recipe, 4, recipe.link, folder / recipe.name, data)
        fastest = min(found, key=lambda one: one.taken)
        for place, one in enumerate(found):
            said = "told to be the fastest, " if place == 0 else ""
            said += "is the fastest" if one is fastest else f"takes {one.taken / fastest.taken:.2f} of the fastest"
            yield ["meshes", recipe.name, "4", one.name, recipe.link, *compared(one.told, one.taken), said]


class Tried(NamedTuple):
    name: str
    told: float
    taken: float
    parts: str


def of_meshes(recipe: Recipe, ranks: int, link: str, folder: Path, data: Path) -> list[Tried]:
    """The fastest first, as it is told."""
    from hvdtrain.planner.fastest import plan_fastest
    from hvdtrain.planner.measured import read_run

    words = words_of(recipe, data, recipe.batch)
    plain = train(recipe, words, folder / "plain", ranks, link)
    rows, batch = 4 * recipe.rows, 4 * recipe.batch  # as many microbatches
    few = ["train.steps=12", "metrics.every=1", f"train.microbatch={rows}", f"train.global_batch={batch}"]
    larger = train(recipe, [*words, *few], folder / "plain-larger", ranks, link)
    cluster = write_figures(folder, figures(ranks, link))
    told = json.loads(plan_fastest(recipe.name, words, ranks, str(cluster), as_json=True, runs=[plain, larger]))
    print("  ".join(f"{name} {value:.4g}" for name, value in told["figures"].items() if value), flush=True)
    found = []
    for one in told["meshes"]:
        run_dir = folder / f"tensor-{one['tensor']}-pipeline-{one['pipeline']}"
        mesh = [f"mesh.tensor={one['tensor']}", f"mesh.pipeline={one['pipeline']}"]
        mesh += [f"sync.allreduce.wire={one['wire']}"]
        is_plain = one["tensor"] == one["pipeline"] == 1 and one["wire"] == "fp32"
        run = read_run(plain if is_plain else train(recipe, [*words, *mesh], run_dir, ranks, link))
        name = f"{one['tensor']} x {one['pipeline']}" + (f", {one['wire']} wire" if one["wire"] != "fp32" else "")
        parts = ", ".join(f"{part} {seconds:.4f}" for part, seconds in one["parts_s"].items() if seconds > 5e-5)
        found.append(Tried(name + (", plain" if is_plain else ""), one["step_s"], run.step_s, parts))
    return found


def figures(ranks: int, link: str) -> dict[str, tuple[float, str]]:
    """Of this machine, with their sources, as a cluster's file has them."""
    from hvdtrain.machine.link import parse_bandwidth

    latency_us, gb_per_s = axis(ranks, link)
    between = gb_per_s, "sums of 1 MiB over an axis"
    if link != "memory":
        between = parse_bandwidth(link, "LINKS") / 8e9, "the link"
    return {
        "ranks_per_node": (ranks if link == "memory" else 1, "this machine"),
        "memory_gib": (16, "this machine"),
        "tflops": (1, "the plain runs say it"),
        "memory_gb_per_s": (1, "the plain runs say it"),
        "inside_us": (latency_us, "sums of 4 KiB over an axis"),
        "inside_gb_per_s": (gb_per_s, "sums of 1 MiB over an axis"),
        "between_us": (latency_us, "sums of 4 KiB over an axis"),
        "between_gb_per_s": between,
        "save_gb_per_s": (1, "nothing is saved"),
    }


def write_figures(folder: Path, found: dict[str, tuple[float, str]]) -> Path:
    import yaml

    tree = {"name": "this machine", "figures": {n: {"value": v, "source": source} for n, (v, source) in found.items()}}
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


@cache
def axis(ranks: int, link: str) -> tuple[float, float]:
    """Of a sum over an axis of all ranks: latency of a turn in microseconds, GB/s of each rank."""
    with launcher(ranks, link) as mpirun:
        import subprocess

        from hvdtrain.commands.ranks_here import RING

        env = {**RING, **os.environ, **environment()}
        done = subprocess.run(
            [*mpirun, sys.executable, __file__, "--rank"], env=env, stdout=subprocess.PIPE, text=True, check=True
        )
    small, large = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    turns = 2 * (ranks - 1)
    return 1e6 * small / turns, turns / ranks * MIB / max(large - small, 1e-9) / 1e9


def measure() -> None:
    """On each rank; rank 0 prints seconds of a sum of 4 KiB and of 1 MiB over an axis of all, as a layer makes them: by
    autograd, and between products, after which one rank comes later than the other.
    """
    import torch

    from hvdtrain.comm.mesh import MeshOptions, make_mesh
    from hvdtrain.comm.session import open_group
    from hvdtrain.comm.world import detect_world
    from hvdtrain.cut.crossings import enter, leave, parts_of

    torch.set_num_threads(1)
    with open_group(detect_world(), parts=True) as group:
        parts = parts_of(make_mesh(group, MeshOptions(tensor=group.size)).tensor)
        factor = torch.rand(192, 192)

        def seconds(size: int) -> float:
            tensor, times = torch.zeros(1, 1, size // 4, requires_grad=True), []
            for _ in range(9):
                group.barrier()
                started = time.perf_counter()
                for _ in range(20):  # two sums: one forward, one backward
                    factor @ factor
                    summed = leave(enter(tensor, parts), parts) if size else None
                    factor @ factor
                    if summed is not None:
                        summed.backward(tensor)
                times.append((time.perf_counter() - started) / 40)
            return statistics.median(times)

        alone, small, large = seconds(0), seconds(4096), seconds(MIB)
        if group.rank == 0:
            print(json.dumps([small - alone, large - alone]), flush=True)


# --- runs ---------------------------------------------------------------------------------------------------------


def words_of(recipe: Recipe, data: Path, batch: int) -> list[str]:
    steps = max(12, round(SHORT * recipe.steps))
    sizes = [f"train.global_batch={batch}", f"train.microbatch={recipe.rows}", f"train.steps={steps}"]
    return [*recipe.words, *RUN, *sizes, f"metrics.every={max(1, steps // 12)}", f"data.dir={data}"]


def train(recipe: Recipe, words: Sequence[str], run_dir: Path, ranks: int, link: str) -> Path:
    from hvdtrain.commands.ranks_here import Place, last_words
    from hvdtrain.machine.link import Link, parse_bandwidth

    slow = None if link == "memory" else Link(parse_bandwidth(link, "LINKS"))
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    log = run_dir.with_suffix(".txt")
    place = Place(ranks, slow, 1, run_dir.with_suffix(".network"))
    ran = place.train([recipe.name, *words, "--run-dir", str(run_dir), "--resume", "never"], log)
    if ran.exit_code:
        sys.exit(f"{run_dir.name} ended with exit code {ran.exit_code}: {last_words(log)}\n{log.read_text()[-2000:]}")
    return run_dir


def compared(told: float, taken: float) -> list[str]:
    return [f"{told:.4f}", f"{taken:.4f}", f"{told / taken:.3f}"]


@contextmanager
def launcher(ranks: int, link: str) -> Iterator[list[str]]:
    from hvdtrain.machine.link import Link, parse_bandwidth, slow_link

    rest = ["-np", str(ranks), "--bind-to", "none"]
    if link == "memory":
        yield ["mpirun", "--oversubscribe", *rest]
        return
    names = [f"n{number}" for number in range(1, ranks + 1)]
    with tempfile.TemporaryDirectory() as name:
        bandwidth = Link(parse_bandwidth(link, "LINKS"))
        with slow_link(names, bandwidth, Path(name) / "network", shared=[Path("/tmp")]) as (_, mpirun):
            yield [*mpirun, *rest]


def environment() -> dict[str, str]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**root, "PATH": path, "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    measure() if sys.argv[1:2] == ["--rank"] else main()
