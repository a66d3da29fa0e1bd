"""Scores of a split do not depend on how many ranks share it."""

from pathlib import Path

import pytest
from in_halves import InHalves
from replicas import sync_options
from tiny import random_tokens, tiny_decoder, write_data

from hvdtrain.comm.group import Group
from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.local_group import LocalGroup
from hvdtrain.data.shards import read_manifest
from hvdtrain.data.stream import TokenStream
from hvdtrain.data.windows import eval_windows
from hvdtrain.tasks.lm import LanguageModel

CONTEXT = 8


class _Sums(LanguageModel):
    def scores(self, sums: list[float]) -> dict[str, float]:
        return {"total": sums[0], "weight": sums[1], **super().scores(sums)}


def _evaluate(folder: Path, group: Group, rows: int) -> dict[str, float]:
    stream = TokenStream([(folder, read_manifest(folder))], "val")
    model = tiny_decoder(dropout=0.5)  # which evaluation must switch off
    plan = InHalves(model, group, sync_options(), "fp32", seed=1)
    scores = plan.evaluate(eval_windows(stream, CONTEXT, rows, group.rank, group.size), _Sums())
    assert model.training
    return scores


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param(11 * CONTEXT, id="11 windows"),
        pytest.param(11 * CONTEXT + 3, id="a shorter one at the end"),
        pytest.param(CONTEXT, id="more ranks than windows"),
        pytest.param(1, id="one target"),
    ],
)
def test_every_rank_count_gives_the_same_scores(group: HorovodGroup, folder: Path, targets: int):
    if group.rank == 0:
        tokens = random_tokens(targets + 1)
        write_data(folder / "data", val=[tokens[: targets // 2], tokens[targets // 2 :]])
    group.barrier()
    # One row a pass: the same fp32 sums whoever computes them, added in fp64. More rows: added in fp32 first.
    for rows, tolerance in ((1, 1e-12), (4, 1e-6)):
        scores = _evaluate(folder / "data", group, rows)
        alone = _evaluate(folder / "data", LocalGroup(), rows)
        assert scores["weight"] == alone["weight"] == targets
        assert scores["val_loss"] == pytest.approx(alone["val_loss"], rel=tolerance)
        assert len({str(other) for other in group.all_gather_object(scores)}) == 1  # all ranks know it, to the last bit
