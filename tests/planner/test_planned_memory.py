"""The plan of a run's size: arithmetic by exact numbers, bytes alive against the same model with real tensors, and the
peak of whole runs.
"""

import json
import sys
import typing
from pathlib import Path

import pytest
import torch
from in_halves import allreduce
from launch import Prepared, succeed, summary
from threads import Scripted
from tiny import stream_of

from hvdtrain.config import RunConfig, load_config, make_config
from hvdtrain.data import windows
from hvdtrain.data.corpora import CorpusFacts
from hvdtrain.data.loader import BUFFERS, Feed
from hvdtrain.data.sampler import WindowSampler
from hvdtrain.errors import ConfigError
from hvdtrain.models.flops import decoder_flops
from hvdtrain.models.matrices import block_matrices
from hvdtrain.models.products import MOST_POSITIONS
from hvdtrain.optim.muon import NewtonSchulz, WholeMatrices
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer, state_bytes
from hvdtrain.planner.dry_run import dry_run
from hvdtrain.planner.memory import loader_bytes, memory
from hvdtrain.planner.workload import build_model, workload
from hvdtrain.sync.allreduce import AllReduceOptions, wire_bytes
from hvdtrain.sync.wire import FORMS, _Exchange, _TwoPhases

FACTS = CorpusFacts(vocab_size=50, classes=3)
SIZES = {"layers": 2, "heads": 4, "width": 32, "context": 24}
MIB = 1 << 20


def settings(**tree) -> RunConfig:
    tree["model"] = {**SIZES, **tree.get("model", {})}
    return make_config({"schedule": {"warmup_steps": 2}, "train": {"steps": 5, "global_batch": 8}, **tree}, "a test")


# --- a step and a run ---------------------------------------------------------------------------------------------


def test_a_step_is_shared_by_the_ranks():
    config = load_config("gpt2-124m")
    load = workload(config, CorpusFacts(50257, train_tokens=1 << 30), 8, 4)
    assert (load.ranks, load.nodes, load.ranks_per_node) == (8, 2, 4)
    assert (load.global_batch, load.rows_of_rank, load.microbatch, load.microbatches) == (480, 60, 12, 5)
    assert (load.positions, load.global_tokens, load.tokens) == (1024, 480 * 1024, 600_000 * 480 * 1024)
    assert load.epochs == load.tokens / (1 << 30)
    assert (load.lr, load.min_lr, load.warmup_steps, load.steps) == (6e-4, 6e-5, 2000, 600_000)
    padded = 50304
    assert load.parameters == 768 * (padded + 1024) + 12 * (12 * 768**2 + 2 * 768) + 768
    assert load.flops_of_step == decoder_flops(config.model, 50257, 60, 1024)
    assert load.replicas == 8


def test_two_byte_wires_send_half_and_one_rank_nothing():
    for wire, size in (("fp32", 4), ("bf16", 2), ("fp16", 2)):
        config = settings(sync={"allreduce": {"wire": wire}})
        loads = [workload(config, FACTS, ranks) for ranks in (1, 4)]
        sent = [memory(config, FACTS, load, "cpu").sent["replica"] for load in loads]
        assert sent == [0, 2 * 3 * size * loads[1].parameters // 4]


def test_nodes_are_filled_one_after_another():
    loads = [workload(settings(), FACTS, ranks, each) for ranks, each in ((8, 0), (8, 3), (2, 4))]
    assert [(load.nodes, load.ranks_per_node) for load in loads] == [(1, 8), (3, 3), (1, 2)]


@pytest.mark.parametrize("task", ["seq2seq", "classify"])
def test_rows_of_their_own_length(task: str):
    config = settings(task={"name": task}, train={"steps": 5, "global_tokens": 200})
    load = workload(config, FACTS, 3)
    assert (load.positions, load.global_batch, load.rows_of_rank) == (24, 8, 3)  # 8 rows: 2, 3 and 3
    load = workload(config, CorpusFacts(50, 3, longest=11), 3)
    assert (load.positions, load.global_batch, load.rows_of_rank) == (11, 18, 6)
    assert load.tokens == 5 * 200
    load = workload(settings(task={"name": task}, train={"steps": 5, "global_tokens": 200, "microbatch": 4}), FACTS, 1)
    assert (load.rows_of_rank, load.microbatch, load.microbatches) == (8, 4, 2)


@pytest.mark.parametrize(
    ("ranks", "each", "message"),
    [
        (0, 0, "--ranks 0: a job has 1 rank or more"),
        (2, -1, "--ranks-per-node -1"),
        (3, 0, r"train.global_batch=8 sequences cannot be shared evenly by 3 ranks"),
    ],
)
def test_ranks_that_cannot_be(ranks: int, each: int, message: str):
    with pytest.raises(ConfigError, match=message):
        workload(settings(), FACTS, ranks, each)


# --- parts of the memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["lm", "mlm", "seq2seq", "classify"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positions": "rotary", "kv_heads": 2, "tied": False, "vocab_multiple": 64},
        {"preset": "t5", "head_width": 12, "ff_width": 40, "head_bias": True},
        {"preset": "marian", "embedding_norm": True, "qkv_bias": "no"},
    ],
)
def test_parameters_are_counted_and_not_made(task: str, options: dict):
    config = settings(task={"name": task}, model=options)
    real = build_model(config, FACTS)
    load = workload(config, FACTS, 1)
    assert load.parameters == sum(p.numel() for p in real.parameters())
    parts = memory(config, FACTS, load, "cpu").parts
    assert parts["weights"] == sum(t.nbytes for t in [*real.parameters(), *real.buffers()])


@pytest.mark.parametrize("name", typing.get_args(OptimOptions.model_fields["name"].annotation))
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_state_of_every_optimizer(name: str, momentum: float):
    model = build_model(settings(), FACTS)
    options = OptimOptions(name=name, momentum=momentum)
    named = dict(model.named_parameters())
    parts = {named[n]: rows for n, rows in block_matrices(named, model.options).items()}
    optimizer = make_optimizer(named.values(), options, matrices=WholeMatrices(parts, NewtonSchulz()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = sum(tensor.nbytes for tensor in tensors if tensor.dim())  # steps are scalars
    counts = [sum(p.numel() for p in some) for some in (named.values(), parts)]
    assert kept == state_bytes(options, *counts)
    config = settings(optim={"name": name, "momentum": momentum})
    assert kept == memory(config, FACTS, workload(config, FACTS, 1), "cpu").parts["optimizer state"]


def test_what_options_add():
    def parts(**tree) -> dict[str, int]:
        config = settings(**tree)
        return memory(config, FACTS, workload(config, FACTS, 2), "cpu").parts

    plain = parts()
    count = plain["gradients"] // 4
    assert plain["optimizer state"] == 8 * count
    for option, name, size in (
        ({"precision": "bf16-weights"}, "16-bit weights", 2),
        ({"ema": {"decay": 0.99}}, "averaged weights", 4),
    ):
        assert (plain[name], parts(**option)[name]) == (0, size * count)
    assert plain["wire buffers"] == 0
    assert parts(sync={"allreduce": {"wire": "bf16"}})["wire buffers"] > 4 * count
    saved = plain["weights"] + plain["optimizer state"]
    assert parts(checkpoint={"asynchronous": True})["copy for saving"] == saved // 2
    assert parts(metrics={"tensorboard": False})["process"] < plain["process"] < parts(compile="blocks")["process"]
    assert parts(eval={"rows": 512})["evaluation"] > 0 == parts(eval={"rows": 1})["evaluation"]
    of_files = CorpusFacts(50, shard_bytes=3 * MIB)
    config = settings()
    assert memory(config, of_files, workload(config, of_files, 2), "cpu").parts["mapped shards"] == 3 * MIB


def test_matrices_that_ranks_make_together_need_room():
    """Alike on two ranks: half is written and made, that half is sent, and all arrives. Pieces are written, sent or
    received, and put together; what a rank has of them under ZeRO is half. Beside that, what a million numbers take
    while they are made orthogonal: updates, two copies in fp32 or 16 bits, and what those are made of.
    """

    def at_most(**tree) -> tuple[int, int]:
        sizes = {"width": 256, "context": 8}
        train = {"steps": 5, "global_batch": 2, "microbatch": 1}
        config = settings(model=sizes, train=train, precision="fp32", **tree)
        load = workload(config, FACTS, 2)
        parts = memory(config, FACTS, load, "cpu").parts
        return parts["activations"] + parts["temporaries"], load.matrices

    def muon(**options: str) -> dict:
        return {"name": "muon", "muon": {"precision": "fp32", **options}}

    plain, _ = at_most()
    peak, matrices = at_most(optim=muon())
    made = (1 << 20) * 4 * 4
    assert (peak, matrices) == (4 * (3 * matrices // 2 + matrices) + made, 2 * 12 * 256 * 256)
    assert at_most(optim=muon(precision="bf16"))[0] == peak - 2 * 2 * matrices - made // 4
    assert plain < at_most(optim=muon(share="never"))[0] == made < peak
    apart = {"name": "average"}
    assert at_most(optim=muon(share="never"), sync=apart) == at_most(optim=muon(), sync=apart)
    assert at_most(optim=muon(), sync={"name": "zero"})[0] == pytest.approx(3 * 4 * matrices / 2 + made, rel=0.01)


def test_a_gpu_counts_tensors_alone():
    config = settings(device="cuda", model={"dropout": 0.1}, checkpoint={"asynchronous": True})
    load = workload(config, FACTS, 2)
    found = memory(config, FACTS, load, "cuda")
    assert not {"process", "allocator", "loader buffers", "mapped shards", "copy for saving"} & set(found.parts)
    assert found.total == sum(found.parts.values()) > 0
    assert "CUDA" in found.assumptions[0]


def test_loss_on_a_gpu_holds_larger_chunks():
    config, facts = settings(model={"context": 1024}), CorpusFacts(8192)
    load = workload(config, facts, 1)
    cpu, gpu = (memory(config, facts, load, device).parts["temporaries"] for device in ("cpu", "cuda"))
    # Logits of all 8,192 targets at once, whose gradient comes in their place: half of what eager torch would hold.
    assert gpu >= 8192 * 8192 * 4 > 5 * cpu


@pytest.mark.parametrize("ranks", [2, 5])
@pytest.mark.parametrize("bucket_mib", [0.004, 16.0])
def test_wire_buffers(ranks: int, bucket_mib: float):
    model = build_model(settings(), FACTS)
    options = AllReduceOptions(wire="bf16", bucket_mib=bucket_mib)
    group = Scripted(size=ranks)  # nobody sends anything
    sync = allreduce(model, group, AllReduceOptions(bucket_mib=bucket_mib))
    wire = _TwoPhases(group, FORMS["bf16"])
    exchanges = [_Exchange(group, FORMS["bf16"], bucket.flat, bucket.run.name) for bucket in sync._buckets.all]
    for exchange in exchanges:
        wire._room(exchange)
    made = sum(t.nbytes for e in exchanges for t in (e._out_pw, e._in_pw)) + wire._work.nbytes
    sizes = [p.numel() for p in model.parameters()]
    expected = wire_bytes(sum(sizes), max(sizes), ranks, options)
    assert expected == pytest.approx(made, rel=0.03)  # made: parts rounded up, and a factor behind each
    assert wire_bytes(sum(sizes), max(sizes), ranks, AllReduceOptions()) == 0
    assert wire_bytes(sum(sizes), max(sizes), 1, options) == 0


def test_loader_buffers_of_windows(tmp_path: Path):
    stream = stream_of(tmp_path / "data", range(3000), 3000)
    config = settings()
    for tokens, batch in ((3000, 8), (3000, 2)):
        config = settings(train={"steps": 5, "global_batch": batch})
        source = windows.WindowSource(stream, WindowSampler(tokens, 24, 1), Feed(24, 1, batch, 0, 0, 2))
        made = BUFFERS * source.steps_per_block * (batch // 2) * 25 * 2 + source._wide.nbytes
        facts = CorpusFacts(3000, train_tokens=tokens)
        assert loader_bytes(config, facts, workload(config, facts, 2)) == pytest.approx(made, rel=0.05)
    unknown = loader_bytes(config, FACTS, workload(config, FACTS, 2))  # blocks of a million tokens
    assert unknown == pytest.approx(3 * 2 * MIB, rel=0.01)


# --- activations --------------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "rotary, rmsnorm, swiglu": {
        "model": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
    },
    "shared heads, window": {"model": {"kv_heads": 2, "window": 5}},
    "post-norm, sinusoids": {"model": {"preset": "vaswani", "head_bias": True, "embedding_norm": True}},
    "relative": {"model": {"preset": "t5", "head_width": 12, "window": 5}},
    "dropout": {"model": {"dropout": 0.1}},
    "untied": {"model": {"tied": False}},
    "bf16": {"precision": "bf16"},
    "bf16-weights": {"precision": "bf16-weights"},
    "fp16": {"precision": "fp16"},
    "recompute full": {"recompute": {"name": "full"}},
    "recompute selective": {"recompute": {"name": "selective"}, "model": {"dropout": 0.1}},
}


@pytest.mark.parametrize("task", ["lm", "mlm", "seq2seq", "classify"])
@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("name", OPTIONS)
def test_without_numbers_as_with_real_tensors(name: str, attention: str, task: str):
    tree = dict(OPTIONS[name])
    if task in ("mlm", "classify") and "window" in tree.get("model", {}):
        tree["model"] = {**tree["model"], "window": 0}
    config = settings(task={"name": task}, **tree)
    for training in (True, False):
        real, counted = (dry_run(config, FACTS, 3, 24, attention, training, shapes) for shapes in (False, True))
        assert counted == real


def test_a_block_by_hand():
    """LayerNorm, attention and GELU without biases, fp32: 16 numbers for each element of the residual stream."""
    rows, positions, width, heads = 3, 24, 32, 4
    stream = rows * positions * width  # inputs of 2 norms and their outputs, q, k, v, attention's output, up 4, GELU 4
    norms = rows * positions * 2 * 2  # mean and 1 / deviation of two norms
    config = settings(model={"bias": False})
    on_gpu = dry_run(config, FACTS, rows, positions, "fused").of_layer
    assert on_gpu == 4 * (16 * stream + norms + rows * positions * heads)  # log-sum-exp of each head
    short = dry_run(config, FACTS, rows, positions).of_layer
    assert short == 4 * (16 * stream + norms + rows * heads * positions**2)  # probabilities
    long = MOST_POSITIONS + 1
    of_row = dry_run(settings(model={"bias": False, "context": long}), FACTS, 1, long).of_layer
    assert of_row == 4 * long * (16 * width + 2 * 2 + heads)


def test_longer_rows_and_more_of_them_take_more():
    config = settings()
    of_layer = [dry_run(config, FACTS, rows, t, "fused").of_layer for rows, t in ((2, 12), (4, 12), (2, 24))]
    assert of_layer[1] == of_layer[2] == 2 * of_layer[0]
    for attention in ("flash", "math"):  # short rows on a CPU
        scores = [dry_run(config, FACTS, 2, t, attention).of_layer for t in (12, 24)]
        assert scores[1] > 2 * scores[0]


def test_recomputing_keeps_less():
    kept = [
        dry_run(settings(recompute={"name": name}), FACTS, 4, 24, "flash").kept
        for name in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_it_leaves_torch_as_it_was():
    def state() -> tuple:
        switches = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
        return *switches, torch.get_rng_state().tolist()

    before = state()
    dry_run(settings(model={"dropout": 0.1}), FACTS, 2, 8, "math")
    assert state() == before
    assert torch.ones(2).sum().item() == 2  # real again


# --- whole runs ---------------------------------------------------------------------------------------------------

GPT = ["model.layers=6", "model.heads=6", "model.width=384", "model.context=256", "train.global_batch=8"]
RUNS = {
    "demo": ("demo", ["model.vocab_multiple=4096"]),
    "shakespeare-char": ("shakespeare-char", ["model.vocab_multiple=65"]),
    "6 x 384, fp32": ("shakespeare-char", [*GPT, "model.vocab_multiple=8192", "eval.rows=8"]),
    "6 x 384, bf16-weights": (
        "shakespeare-char",
        [*GPT, "model.vocab_multiple=8192", "eval.rows=8", "precision=bf16-weights"],
    ),
}


PLAN = "import sys; from hvdtrain.planner.estimate import plan; print(plan(sys.argv[1], sys.argv[2:], 1, as_json=True))"


@pytest.mark.parametrize("name", RUNS)
def test_within_a_tenth_of_the_measured_peak(name: str, prepared: Prepared, tmp_path: Path):
    recipe, words = RUNS[name]
    # The small corpus, with the recipe's vocabulary by padding; a few steps show the peak.
    words = [*words, f"data.dir={prepared.shards}", "train.steps=4", "schedule.warmup_steps=2", "eval.every=2"]
    succeed("train", recipe, *words, "--run-dir", tmp_path / "run", timeout_s=240)
    measured = summary(tmp_path / "run")["memory_peak_mib"]
    printed = succeed(recipe, *words, program=(sys.executable, "-c", PLAN), timeout_s=120).stdout
    estimated = json.loads(printed)["memory_peak_mib"]
    assert estimated == pytest.approx(measured, rel=0.1)
