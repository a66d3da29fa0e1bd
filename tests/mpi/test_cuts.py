"""Every cut of a replica, beside every other one, and what a run may ask of it: equal to one process.

At one rank there is nothing to cut. At two each axis stands alone; at four there are all products of two axes.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import WORLD
from cuts import Outcome, Trial, alone, distances, mesh_of, run

from hvdtrain.comm.group import Group
from hvdtrain.cut.options import CutOptions

STEPS = 20
# Sums in another order: of a tensor's gradient in the first step, and what the steps make of that.
GRADIENT, PARAMETER = 2e-6, 1e-5


@dataclass(frozen=True)
class Cut:
    tensor: int = 1
    pipeline: int = 1
    zero: int = 0
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    sequence: bool = True

    def __str__(self) -> str:
        axes = {"t": self.tensor, "p": self.pipeline, "zero": self.zero}
        names = [f"{name}{size}" for name, size in axes.items() if size > (name != "zero")]
        return "-".join([*names, *([self.schedule] if self.pipeline > 1 else [])])

    @property
    def options(self) -> CutOptions:
        return CutOptions(schedule=self.schedule, stages_per_rank=self.stages_per_rank, sequence=self.sequence)


INTERLEAVED = {"schedule": "interleaved", "stages_per_rank": 2}
CUTS = {
    1: [Cut()],
    2: [
        Cut(tensor=2),
        *(Cut(pipeline=2, schedule=name) for name in ("gpipe", "1f1b", "zero_bubble")),
        Cut(pipeline=2, **INTERLEAVED),
        Cut(zero=1),
        Cut(zero=2),
    ],
    4: [
        Cut(tensor=4),
        *(Cut(pipeline=4, schedule=name) for name in ("gpipe", "1f1b", "zero_bubble")),
        Cut(pipeline=4, **INTERLEAVED),
        Cut(zero=1),
        Cut(zero=2),
        Cut(tensor=2),  # and two replicas, as of all that take two ranks
        Cut(tensor=2, pipeline=2),
        Cut(tensor=2, zero=1),
        Cut(tensor=2, zero=2),
        Cut(pipeline=2),
        Cut(pipeline=2, zero=1),
        Cut(pipeline=2, **INTERLEAVED),
    ],
}.get(WORLD.size, [])
TASKS = {"lm": {"positions": "rotary", "activation": "swiglu"}, "classify": {}, "seq2seq": {"positions": "relative"}}


def cut_run(group: Group, cut: Cut, trial: Trial, steps: int = STEPS) -> Outcome:
    if cut.zero:
        trial = replace(trial, sync={"name": "zero", "zero": {"stage": cut.zero}})
    return run(trial, mesh_of(group, cut.tensor, cut.pipeline), cut.options, steps)


def check_equal(cut: Cut, found: Outcome, expected: Outcome) -> None:
    if not cut.zero:  # whose step leaves other numbers where the gradient was
        worst = max(distances(found.gradients, expected.gradients).items(), key=lambda item: item[1])
        assert worst[1] <= GRADIENT, f"gradient of {worst}"
    worst = max(distances(found.parameters, expected.parameters).items(), key=lambda item: item[1])
    assert worst[1] <= PARAMETER, worst
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    assert dict(found.scores) == pytest.approx(dict(expected.scores), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_cut_model_is_one_process(group: Group, cut: Cut, task: str):
    """Gradients, parameters after twenty steps of AdamW, losses, norms and scores."""
    # What is dropped depends on the replica and the part of a layer: one replica in stages drops what is dropped alone.
    dropout = 0.1 if cut.pipeline == WORLD.size else 0.0
    trial = Trial(task, {**TASKS[task], "dropout": dropout}, microbatch=1 if cut.pipeline > 1 else 4)
    check_equal(cut, cut_run(group, cut, trial), alone(trial, STEPS))


TWO_AXES = [cut for cut in CUTS if cut in (Cut(tensor=2, pipeline=2), Cut(pipeline=2), Cut(tensor=2, zero=1))]


@pytest.mark.parametrize("optimizer", ["lamb", "lars", "sgd"])
@pytest.mark.parametrize("cut", TWO_AXES, ids=str)
def test_optimizers_know_whole_tensors(group: Group, cut: Cut, optimizer: str):
    trial = Trial("lm", {"tied": True}, optim={"name": optimizer})
    check_equal(cut, cut_run(group, cut, trial, 5), alone(trial, 5))


@pytest.mark.parametrize("cut", TWO_AXES, ids=str)
def test_averages_recomputation_and_accumulation(group: Group, cut: Cut):
    trial = Trial("lm", ema=0.9, recompute="full", microbatch=2)
    found, expected = cut_run(group, cut, trial, 5), alone(trial, 5)
    check_equal(cut, found, expected)
    assert max(distances(found.averages, expected.averages).values()) <= PARAMETER


@pytest.mark.parametrize("cut", TWO_AXES, ids=str)
def test_clipping_knows_the_whole_gradient(group: Group, cut: Cut):
    trial = Trial("lm", optim={"clip_norm": 0.3, "name": "sgd"})
    found, expected = cut_run(group, cut, trial, 5), alone(trial, 5)
    assert min(expected.norms) > 0.3, "nothing would be clipped"
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert max(distances(found.parameters, expected.parameters).values()) <= PARAMETER


@pytest.mark.parametrize("precision", ["bf16", "bf16-weights", "fp16"])
@pytest.mark.parametrize("cut", [cut for cut in TWO_AXES if cut.zero == 0], ids=str)
def test_fewer_bits_are_as_near_to_fp32_as_uncut(group: Group, cut: Cut, precision: str):
    """The distance of all gradients together; a scaled loss that overflows is left out by all ranks alike."""
    exact, trial = alone(Trial("lm"), 1), Trial("lm", precision=precision)
    steps = 1 if precision != "fp16" else 12  # until the scale has come down
    found, uncut = cut_run(group, cut, trial, steps), alone(trial, steps)
    if precision == "fp16":
        assert found.losses == pytest.approx(uncut.losses, rel=1e-2)
        return

    def distance(one: Outcome) -> float:
        return sum(float((one.gradients[n] - g).norm()) ** 2 for n, g in exact.gradients.items()) ** 0.5

    assert distance(found) <= 1.1 * distance(uncut)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning", "ignore:The .grad attribute")  # inside torch
@pytest.mark.parametrize("cut", [cut for cut in CUTS if WORLD.size == 2 and cut in (Cut(2), Cut(pipeline=2))], ids=str)
def test_compiled_blocks(group: Group, cut: Cut, monkeypatch: pytest.MonkeyPatch):
    """Traced, and run as traced: what is made of the graphs in C++ no cut changes."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="aot_eager"))
    torch._dynamo.reset()
    trial = Trial("lm", compile="blocks", microbatch=4)
    check_equal(cut, cut_run(group, cut, trial, 3), alone(replace(trial, compile="none"), 3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


@pytest.mark.parametrize("cut", TWO_AXES[:1], ids=str)
def test_all_ranks_leave_out_the_same_step(group: Group, cut: Cut):
    """The guard judges the whole model's norm: a spike of one stage's gradient counts for all."""
    trial = Trial("lm", guard={"policy": "skip", "spike_norm": 1 + 1e-6})
    found, expected = cut_run(group, cut, trial, STEPS), alone(trial, STEPS)
    assert found.engine.guard.check(STEPS)[0] == expected.engine.guard.check(STEPS)[0]
    assert max(distances(found.parameters, expected.parameters).values()) <= PARAMETER


def test_more_than_one_replica_measures_the_noise(group: Group):
    """As whole replicas do: squares of a cut gradient add up over its ranks, and what several hold counts once. What
    several ranks have a share of is left out: the embedding of first and last stage, norms of a split sequence.
    """
    if WORLD.size != 4:
        return
    trial, cuts = Trial("lm", {"tied": False}), (Cut(tensor=2, sequence=False), Cut(pipeline=2))
    found = [cut_run(group, cut, trial, 6).engine.noise.state() for cut in cuts]
    assert all(number != 0 for number in found[0])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
