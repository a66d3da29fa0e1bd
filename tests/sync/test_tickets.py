"""Rows that are dealt: each once, whoever is fast, whoever is refused or lost; and how old a gradient is."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hvdtrain.sync.book import Book

WORKERS = st.integers(1, 5)
# Of each event: which worker, and what comes of its push; a worker without a ticket asks for one.
EVENTS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["taken", "refused", "lost"])), max_size=200)


@given(WORKERS, EVENTS, st.integers(0, 3), st.integers(1, 6))
def test_every_row_is_consumed_once_whatever_becomes_of_a_push(workers: int, events: list, behind: int, steps: int):
    book, last = Book(range(workers), behind), behind + steps
    held: dict[int, int] = {}
    finished: list[int] = []
    rest = [(worker, "taken") for worker in range(workers)] * 2 * (steps * workers + 1)  # asked for, and taken
    for number, what in [*events, *rest]:
        worker = number % workers
        if worker not in held:
            if (ticket := book.deal(worker, last)) is not None:
                assert ticket not in held.values()
                held[worker] = ticket
        elif what == "taken":
            book.finish(worker, is_update=True)
            finished.append(held.pop(worker))
        else:
            book.take_back(worker)
            del held[worker]
    assert sorted(finished) == list(range(behind * workers, last * workers))
    assert book.finished == last * workers == book.dealt


def test_a_returned_ticket_goes_to_another_worker_first():
    book = Book(range(2), 0)
    assert [book.deal(0, 2), book.deal(1, 2)] == [0, 1]
    book.take_back(0)
    assert book.deal(0, 2) == 2  # not the same again, as long as there are others
    book.finish(1, is_update=True)
    assert book.deal(1, 2) == 0
    book.take_back(1)
    assert book.deal(1, 1) == 0  # nothing else is left of this step


def test_no_ticket_of_a_later_step_is_dealt():
    book = Book(range(2), 0)
    assert [book.deal(0, 1), book.deal(1, 1)] == [0, 1]
    book.finish(0, is_update=True)
    assert book.deal(0, 1) is None
    assert book.deal(0, 2) == 2


def test_staleness_counts_the_updates_that_a_worker_has_not_seen():
    book = Book(range(3), 0)
    for worker in range(3):
        book.deal(worker, 9)
    for turn, worker in enumerate((0, 1, 0, 0, 2)):
        assert book.staleness(worker) == [0, 1, 0, 0, 3][turn]
        book.finish(worker, is_update=worker != 1)  # one without targets moves nothing
        book.note_pull(worker)
        book.deal(worker, 9)
    assert book.updates == 4


def test_a_slow_worker_holds_up_nobody():
    """Four workers, one of them four times as slow: each of the others has as many tickets as if all were fast."""
    took = Counter[int]()
    book, seconds = Book(range(4), 0), [1, 1, 1, 4]
    ready = dict.fromkeys(range(4), 0)
    for now in range(401):
        for worker in range(4):
            if ready[worker] == now:
                if now:
                    book.finish(worker, is_update=True)
                    took[worker] += 1
                assert book.deal(worker, 10**6) is not None
                ready[worker] = now + seconds[worker]
    assert took == {0: 400, 1: 400, 2: 400, 3: 100}
