"""Which all-reduce of Open MPI's: what the user has said, before anything is measured. tests/mpi/test_algorithms.py has
the rest.
"""

from types import SimpleNamespace

import pytest

from hvdtrain.comm.open_mpi import RULES, WISH, AllReduce, allow_choice, choose_all_reduce
from hvdtrain.errors import LaunchError


def other_mpi(*others: tuple) -> SimpleNamespace:
    """An MPI that is not Open MPI, whose other ranks say what they say."""
    world = SimpleNamespace(allgather=lambda own: [own, *others])
    return SimpleNamespace(get_vendor=lambda: ("MPICH", (4, 2, 0)), COMM_WORLD=world)


def test_a_choice_is_made_possible():
    env = {"OMPI_MCA_btl": "self,tcp"}
    allow_choice(env)
    assert env == {"OMPI_MCA_btl": "self,tcp", RULES: "1"}


@pytest.mark.parametrize(
    "users",
    [
        {"OMPI_MCA_coll_tuned_allreduce_algorithm": "3"},
        {"OMPI_MCA_coll": "^tuned"},
        {"OMPI_MCA_coll_tuned_dynamic_rules_filename": "rules"},
        {RULES: "0"},
    ],
)
def test_what_the_user_has_set_stays(users: dict):
    env = dict(users)
    allow_choice(env)
    assert env == users


def test_another_mpi_has_nothing_to_choose():
    assert choose_all_reduce(other_mpi((None, False, "n2")), {}) is None
    assert choose_all_reduce(other_mpi(("ring", False, "n2")), {WISH: "ring"}) is None


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [("rign", "rign", "rign"), ("ring", None, "ring or unset"), (None, "ring", "ring or")],
)
def test_a_wish_that_makes_no_sense(mine: str | None, theirs: str | None, said: str):
    """On all ranks: each of them has all wishes."""
    with pytest.raises(LaunchError, match=f"^HVDTRAIN_ALLREDUCE={said}.*: expected one of default, ring, measure"):
        choose_all_reduce(other_mpi((theirs, False, "n1")), {} if mine is None else {WISH: mine})


def test_what_is_said_of_it():
    assert AllReduce("ring", 98.04, 57.2).about == (
        "all-reduce: ring; 4 MiB take 98 ms by Open MPI's own choice, 57.2 ms by its ring"
    )
    assert AllReduce("ring").about == "all-reduce: ring (HVDTRAIN_ALLREDUCE)"
