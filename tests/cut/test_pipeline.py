"""A pipeline on threads against the whole model. Dropout is compared under MPI: threads share a generator."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipelines import ALONE, TASKS, added_up, apart, batches, gradients, made, tokens
from threads import on_ranks

from hvdtrain.comm.mesh import Mesh, MeshOptions, make_mesh
from hvdtrain.cut.options import CutOptions
from hvdtrain.errors import RankError
from hvdtrain.tasks.search import Input, search
from hvdtrain.tasks.search_options import SearchOptions

MOST = 2e-6  # of a tensor's norm, fp32. Seen: 1.3e-7; sums over microbatches are made in the order of one process.
INTERLEAVED = CutOptions(schedule="interleaved", stages_per_rank=2)


def on_stages(ranks: int, work: Callable[[Mesh], Any]) -> list[Any]:
    return on_ranks(ranks, lambda group: work(make_mesh(group, MeshOptions(pipeline=ranks))))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("ranks, cut", [(2, CutOptions()), (2, INTERLEAVED), (4, CutOptions(schedule="zero_bubble"))])
def test_gradients_are_those_of_one_process(name: str, ranks: int, cut: CutOptions):
    """Twice: the second time the ranks know how large is what they will be sent."""
    expected = gradients(made(name), name, 3)

    def work(mesh: Mesh) -> list[dict[str, torch.Tensor]]:
        replica, found = made(name, mesh, cut), []
        for _ in range(2):
            found.append(gradients(replica, name, 3))
            for used in replica.computing:
                used.grad = None
        return found

    for step in zip(*on_stages(ranks, work), strict=True):
        distance, where = apart(added_up(step), expected)
        assert distance < MOST, where


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_gradients_of_blocks_that_are_computed_again(schedule: str):
    """The loss is scaled, too."""
    expected = gradients(made("decoder", recompute="full"), "decoder", 2, scale=1024.0)
    cut = CutOptions(schedule=schedule)
    found = on_stages(
        2, lambda mesh: gradients(made("decoder", mesh, cut, recompute="full"), "decoder", 2, scale=1024.0)
    )
    distance, where = apart(added_up(found), expected)
    assert distance < MOST, where


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
@pytest.mark.parametrize("precision", ["bf16", "bf16-weights"])
def test_in_few_bits_gradients_are_no_farther_from_fp32_than_those_of_one_process(precision: str, schedule: str):
    exact = laid_out(gradients(made("decoder"), "decoder", 2))
    alone = laid_out(gradients(made("decoder", precision=precision), "decoder", 2))
    cut = CutOptions(schedule=schedule)
    found = on_stages(2, lambda mesh: gradients(made("decoder", mesh, cut, precision), "decoder", 2))
    assert (laid_out(added_up(found)) - exact).norm() <= 1.1 * (alone - exact).norm()


def laid_out(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients in one."""
    return torch.cat([found[name].flatten() for name in sorted(found) if name != "loss"])


def test_a_tensor_that_several_stages_have_is_one_on_a_rank_and_held_by_all_of_them():
    """Four stages on two ranks: all have attention, whose bias of positions is one; the head is the embedding."""

    def work(mesh: Mesh) -> dict[str, tuple[int, int, int]]:
        replica = made("decoder", mesh, INTERLEAVED, layers=4)
        return {
            piece.name: (uses, piece.copies, piece.holders.size)
            for piece, uses in zip(replica.slices, replica.uses, strict=True)
        }

    first, second = on_stages(2, work)
    assert first["relative.weight"] == second["relative.weight"] == (2, 2, 2)
    assert first["embedding.weight"] == second["embedding.weight"] == (1, 2, 2)
    assert first["blocks.0.attention.qkv.weight"] == (1, 1, 1)
    assert "blocks.0.attention.qkv.weight" not in second


@pytest.mark.parametrize("name", TASKS)
def test_scores_are_those_of_one_process_on_all_ranks(name: str):
    expected = made(name).measure(batches(name, 3), TASKS[name][1])

    def work(mesh: Mesh) -> tuple[Any, Any]:
        replica = made(name, mesh, INTERLEAVED)
        return replica.measure(batches(name, 3), TASKS[name][1]), replica.measure([], TASKS[name][1])

    for found, nothing in on_stages(2, work):
        torch.testing.assert_close(found, expected)
        assert nothing is None


@pytest.mark.parametrize("cut", [CutOptions(), INTERLEAVED])
@pytest.mark.parametrize("name", ["decoder", "seq2seq"])
@pytest.mark.parametrize("options", [SearchOptions(max_tokens=6), SearchOptions(beam=3, n_best=2, max_tokens=6)])
def test_all_ranks_find_the_texts_that_one_process_finds(name: str, options: SearchOptions, cut: CutOptions):
    sources = [None, None] if name == "decoder" else [tokens(5, 9)[0].tolist(), tokens(6, 7)[0].tolist()]
    inputs = [Input([4, 5, 6][: 3 - n], source, n) for n, source in enumerate(sources)]

    def found(mesh: Mesh) -> Any:
        model = made(name, mesh, cut).answering.eval()
        return search(model, inputs, options, stop=2)

    expected = found(ALONE)
    for texts in on_stages(2, found):
        assert [[one.tokens for one in of_input] for of_input in texts] == [
            [one.tokens for one in of_input] for of_input in expected
        ]


def test_a_stage_has_room_for_keys_and_values_of_its_own_blocks():
    """Of three blocks the second is parted between the stages."""

    def layers(mesh: Mesh) -> list[int]:
        stages = made("decoder", mesh, layers=3).answering.eval()
        caches = stages.new_cache()
        stages.logits(stages.decode(tokens(1, 4), caches))
        return [len(cache._keys_values) for cache in caches.of.values()]

    assert on_stages(2, layers) == [[2], [2]]


def test_what_the_model_returns_is_known_on_all_ranks():
    """As the tasks ask that label texts."""
    batch = batches("encoder", 1)[0]
    expected = made("encoder").answering.eval()(batch.tokens, batch.lengths)
    outputs = on_stages(2, lambda mesh: made("encoder", mesh).answering.eval()(batch.tokens, batch.lengths).detach())
    for output in outputs:
        torch.testing.assert_close(output, expected)


def test_more_stages_than_pieces_are_refused_with_the_most_that_works():
    with pytest.raises(RankError, match="makes 10 stages, but the model can be cut into 5 at most"):
        on_stages(2, lambda mesh: made("decoder", mesh, CutOptions(schedule="interleaved", stages_per_rank=5)))


def test_gradients_add_up_over_the_ranks_that_have_the_tensor():
    """Four of them: the last has no attention, so the bias of positions is the first three's."""

    def work(mesh: Mesh) -> dict[str, list[int]]:
        return {piece.name: piece.holders.all_gather_object(mesh.pipe.rank) for piece in made("decoder", mesh).slices}

    found = on_stages(4, work)
    for of_rank in found:
        for name, holders in of_rank.items():
            assert holders == [rank for rank in range(4) if name in found[rank]], name
