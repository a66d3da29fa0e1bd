"""The doctor's look at collectives passes on any number of ranks; tests/comm/test_wrong_collectives.py has it fail."""

from hvdtrain.comm.horovod_group import HorovodGroup
from hvdtrain.comm.selftest import check_collectives


def test_all_are_right(group: HorovodGroup):
    over = "shared memory" if group.size > 1 else "none"
    assert check_collectives(group) == (
        f"all-reduce, all-to-all, all-gather, broadcast ok over {group.backend}; "
        f"sums, parts and messages of an axis ok over {over}"
    )
