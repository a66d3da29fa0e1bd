"""Replicas that train apart, and the one that is made of them."""

from apart import Training, assert_equal
from threads import ThreadGroup, on_ranks

from hvdtrain.sync import SyncOptions
from hvdtrain.sync.average import AverageOptions


def fused(fuse: str, spoil: int | None = None) -> list[tuple]:
    """Each rank's own weights, its report, and what was saved. spoil: a replica whose weights are noise in the end."""

    def work(group: ThreadGroup) -> tuple:
        run = Training(group, SyncOptions(name="average", average=AverageOptions(fuse=fuse)), steps=6)
        for step in range(1, 7):
            run.step(saved=step == 6)
        if group.rank == spoil:
            for parameter in run.model.parameters():
                parameter.data.mul_(-5)
        own = run.weights()
        with run.sync.viewed():
            viewed = run.weights()
        saved = run.save()
        assert_equal({f"model.{name}": value for name, value in viewed.items()}, saved_model(saved), 1e-6)
        return own, saved, dict(run.sync.report())

    return on_ranks(3, work)


def saved_model(saved: dict) -> dict:
    return {name: value for name, value in saved.items() if name.startswith("model.")}


def mean_of(ranks: list[tuple], members: list[int]) -> dict:
    owns = [ranks[member][0] for member in members]
    return {f"model.{name}": sum(own[name] for own in owns) / len(owns) for name in owns[0]}


def assert_is_mean(ranks: list[tuple], members: list[int]) -> None:
    expected = mean_of(ranks, members)
    for _, saved, _ in ranks:
        assert_equal({name: saved[name] for name in expected}, expected, 1e-6)


def test_the_mean_of_all_with_its_loss_beside_theirs():
    ranks = fused("mean")
    assert_is_mean(ranks, [0, 1, 2])
    report = ranks[0][2]
    losses = [report[f"val_loss_of_replica_{number}"] for number in range(3)]
    assert len(set(losses)) == 3
    assert report["val_loss_fused"] < max(losses)
    assert report["replicas_fused"] == 3
    assert ranks[1][2] == report


def test_a_soup_leaves_out_what_spoils_it():
    ranks = fused("soup", spoil=1)
    report = ranks[0][2]
    assert report["val_loss_of_replica_1"] > report["val_loss_of_replica_0"] + 1
    assert report["replicas_fused"] == 2
    assert_is_mean(ranks, [0, 2])
    assert report["val_loss_fused"] <= min(report[f"val_loss_of_replica_{number}"] for number in range(3))
    assert_equal(ranks[0][1], ranks[1][1])  # the spoilt one has the optimizer's state of the others, too
