"""Messages between ranks: tags. What they carry is tested over MPI (tests/mpi/test_group.py and test_wire.py)."""

from types import SimpleNamespace

import pytest

from hvdtrain.comm.messages import MOST_RANKS, Messages, can_serve


def messages() -> Messages:
    return Messages(SimpleNamespace(), SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 2))


def test_names_that_are_used_have_tags_of_their_own():
    found = messages()
    names = [f"hvdtrain.gradients.{n}{end}" for n in range(2000) for end in (".parts", ".sums", ".weights", "")]
    assert len({found._tag(name) for name in names}) == len(names)
    assert found._tag(names[5]) == found._tag(names[5])


def test_two_names_of_one_tag_are_our_mistake():
    found = messages()
    found._names[found._tag("a")] = "b"
    with pytest.raises(AssertionError, match="a and b have one tag: rename one of them"):
        found._tag("a")


@pytest.mark.parametrize(
    ("ranks", "threads", "tags", "serves"),
    [
        (2, 3, 2**31 - 1, True),
        (MOST_RANKS, 3, 2**31 - 1, True),
        (MOST_RANKS + 1, 3, 2**31 - 1, False),
        (1, 3, 2**31 - 1, False),
        (2, 2, 2**31 - 1, False),  # Horovod's thread is in MPI while this one wants to be
        (2, 3, 2**23, False),
    ],
)
def test_where_they_cannot_serve_horovods_collectives_do(ranks: int, threads: int, tags: int, serves: bool):
    world = SimpleNamespace(Get_attr=lambda key: tags)
    mpi = SimpleNamespace(Query_thread=lambda: threads, THREAD_MULTIPLE=3, TAG_UB=1, COMM_WORLD=world)
    assert can_serve(mpi, ranks) == serves
