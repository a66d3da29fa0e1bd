"""Every task on any number of ranks: a batch's rows are dealt out, and what comes of it is as on one process.

Batches of 24 tokens hold one to three rows, so that of several ranks some have none; those of 120 hold a dozen.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import state_of
from in_halves import InHalves
from replicas import distance, gradients, sync_options
from tiny import CPU, documents, labelled, pairs, random_tokens, several, write_corpus

from hvdtrain.checkpoint import reader, writer
from hvdtrain.checkpoint.manifest import Progress
from hvdtrain.checkpoint.valid import newest_valid
from hvdtrain.checkpoint.writer import CheckpointOptions
from hvdtrain.comm.group import Group
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.corpora import DataOptions, open_corpora
from hvdtrain.data.loader import Feed, TrainLoader
from hvdtrain.models.options import TransformerOptions
from hvdtrain.optim.optimizer import OptimOptions, make_optimizer
from hvdtrain.optim.update import Agreed
from hvdtrain.slices import whole_slices
from hvdtrain.tasks import TaskOptions, make_task

TASK_OF = {"text": "mlm", "pairs": "seq2seq", "labels": "classify", "several": "classify"}
CONTEXT, LR = 24, 0.01
MODEL = TransformerOptions(layers=2, heads=2, width=16, context=CONTEXT, ff_ratio=2.0)
OPTIM = OptimOptions(eps=1e-5)  # as in test_reference: AdamW shall not blow rounding up to full steps
# fp32, all relative: a rank pads to its own longest row and adds its own rows up first. Seen: 3e-7, 2e-6, 2e-7.
GRADIENT_TOLERANCE, PARAMETER_TOLERANCE, SCORE_TOLERANCE = 5e-6, 2e-5, 5e-6


@pytest.fixture(params=TASK_OF)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def data(group: HorovodGroup, folder: Path, kind: str) -> Path:
    """40 rows of 1 to 30 tokens for training, of which those above the context are left out; 3 for validation."""
    if group.rank == 0:
        lengths = np.random.default_rng(7).integers(1, 31, 86).tolist()
        texts = [random_tokens(length, seed=number).tolist() for number, length in enumerate(lengths)]
        rows = list(zip(texts[::2], texts[1::2], strict=True))
        if kind == "labels":
            rows = [(text, number % 3) for number, (text, _) in enumerate(rows)]
        elif kind == "several":
            rows = [(text, range(number % 4)) for number, (text, _) in enumerate(rows)]
        elif kind == "text":
            rows = texts[::2]
        shard = {"text": documents, "pairs": pairs, "labels": labelled, "several": several}[kind]
        splits = {"train": [shard(rows[:15]), shard(rows[15:40])], "val": [shard(rows[40:])]}
        more = {"label_names": ("a", "b", "c")} if TASK_OF[kind] == "classify" else {}
        more |= {"kind": "labels", "version": 2} if kind == "several" else {"kind": kind}
        write_corpus(folder / "data", splits, special_tokens={"eos": 0, "mask": 1}, **more)
    group.barrier()
    return folder / "data"


class Run:
    """A training of a model on some ranks, as the loop walks it."""

    def __init__(self, data: Path, kind: str, group: Group, tokens: int = 24, microbatch: int = 0):
        self.group, self.corpora = group, open_corpora(DataOptions(dir=str(data)))
        self.task = make_task(TaskOptions(name=TASK_OF[kind]))
        self.feed = Feed(CONTEXT, 5, 8, microbatch, group.rank, group.size, tokens)
        self.model = self.task.make_model(MODEL, self.corpora.manifest)
        self.model.initialise(0)
        with torch.no_grad():  # of the size that training gives: at the start attention is nearly even, and hides much
            for parameter in self.model.parameters():
                parameter.mul_(5 if parameter.dim() > 1 else 1)
        self.optimizer = make_optimizer(self.model.parameters(), OPTIM)
        self.plan = InHalves(self.model, group, sync_options(), "fp32", seed=1)
        self.loader = TrainLoader(self.task.open_training(self.corpora, self.feed).source, CPU)
        self.rowless, self._before = 0, 0

    def gradient(self, step: int) -> Agreed:
        batches = self.loader.next_step()
        self.rowless += not sum(batch.target_tokens for batch in batches)
        self.plan.forward_backward(batches, self.task, step)
        return self.plan.finish(max_norm=1.0)

    def steps(self, first: int, last: int) -> "Run":
        for step in range(first, last + 1):
            self.gradient(step)
            self.plan.step(self.optimizer, LR)
        return self

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def scores(self, rows: int) -> dict[str, float]:
        return self.plan.evaluate(self.task.open_evaluation(self.corpora, "val", self.feed, rows)(), self.task)

    def digest(self) -> int:
        return (self._before + sum(self.group.all_gather_object(self.loader.fingerprint))) % (1 << 64)

    def save(self, run_dir: Path, step: int) -> None:
        progress = Progress(step, self.loader.rows_consumed, 0, self.digest(), None, {}, self.group.size, {})
        writer.save(run_dir, state_of(self.model, self.optimizer), progress, self.group, CheckpointOptions())

    def load(self, run_dir: Path) -> "Run":
        found, progress, _ = newest_valid(run_dir, self.group)
        reader.load(found, whole_slices(self.model, self.group), self.optimizer)
        self.loader.rows_consumed, self._before = progress.rows_consumed, progress.fingerprint
        return self

    def close(self) -> None:
        self.plan.sync.close()
        self.loader.close()


@pytest.fixture
def run(data: Path, kind: str):
    """``run(group, ...)``: a Run that is closed at the end."""
    made = []

    def make(group: Group, **how: int) -> Run:
        made.append(Run(data, kind, group, **how))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("tokens", "microbatch"), [(24, 0), (120, 0), (120, 2)])
def test_the_gradient_of_one_process(group: HorovodGroup, run, tokens: int, microbatch: int):
    shared, alone = run(group, tokens=tokens, microbatch=microbatch), run(LocalGroup(), tokens=tokens)
    for step in range(1, 5):
        found, expected = shared.gradient(step), alone.gradient(step)
        assert found.weight == expected.weight > 0
        assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        assert found.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=GRADIENT_TOLERANCE)
        assert distance(gradients(shared.model), gradients(alone.model)) < GRADIENT_TOLERANCE
        assert shared.digest() == alone.digest()
    may_lack_rows = group.size > 1 and not shared.task.rows_are_alike
    assert tokens > 24 or (sum(group.all_gather_object(shared.rowless)) > 0) == may_lack_rows


@pytest.mark.parametrize(("tokens", "microbatch"), [(24, 0), (120, 2)])
def test_parameters_after_three_steps(group: HorovodGroup, run, tokens: int, microbatch: int):
    shared, alone = run(group, tokens=tokens, microbatch=microbatch), run(LocalGroup(), tokens=tokens)
    start = alone.parameters()
    found, expected = shared.steps(1, 3).parameters(), alone.steps(1, 3).parameters()
    moved = {name: expected[name] - start[name] for name in start}
    assert distance({name: found[name] - start[name] for name in start}, moved) < PARAMETER_TOLERANCE
    raw = b"".join(value.numpy().tobytes() for value in found.values())
    assert len(set(group.all_gather_object(raw))) == 1  # the replicas are equal to the last bit


@pytest.mark.parametrize("rows", [1, 2])
def test_scores(group: HorovodGroup, run, rows: int):
    """Three rows: of four ranks one has none."""
    shared, alone = run(group), run(LocalGroup())
    found, expected = shared.scores(rows), alone.scores(rows)
    assert found == pytest.approx(expected, rel=SCORE_TOLERANCE)
    assert len({str(other) for other in group.all_gather_object(found)}) == 1  # all ranks know it, to the last bit


@pytest.mark.parametrize("kind_of_first", ["all", "one"])
def test_three_steps_and_three_more_on_other_ranks(group: HorovodGroup, run, folder: Path, kind_of_first: str):
    """All ranks and then one, or one and then all: as six steps of one."""
    unbroken = run(LocalGroup()).steps(1, 6)
    if kind_of_first == "all":
        run(group).steps(1, 3).save(folder, 3)
        resumed = run(LocalGroup()).load(folder).steps(4, 6)
    else:
        if group.rank == 0:
            run(LocalGroup()).steps(1, 3).save(folder, 3)
        group.barrier()
        resumed = run(group).load(folder).steps(4, 6)
    assert resumed.digest() == unbroken.digest()
    assert resumed.scores(2)["val_loss"] == pytest.approx(unbroken.scores(2)["val_loss"], rel=SCORE_TOLERANCE)
