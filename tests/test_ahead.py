"""Work done ahead: in order, bounded, stopped cleanly."""

import threading

import pytest

from graphgbp.ahead import ahead, taken_ahead

PATIENCE = 30  # seconds until a test that waits for an event fails


def wait(event):
    assert event.wait(PATIENCE), "nothing happens"


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("graphgbp")]


def test_in_order_though_the_first_ends_last():
    last = threading.Event()

    def work(n):
        if n == 0:
            wait(last)
        elif n == 3:
            last.set()
        return n * n

    assert list(ahead(work, range(5), limit=4, threads=2)) == [0, 1, 4, 9, 16]


def test_the_next_are_done_while_the_caller_is_busy():
    done = [threading.Event() for _ in range(4)]
    for n, _ in enumerate(ahead(lambda n: done[n].set(), range(4), limit=2)):
        for event in done[n : n + 3]:
            wait(event)


@pytest.mark.parametrize("limit", [1, 5])
def test_no_more_are_taken_than_the_limit(limit):
    taken = []

    def items():
        for n in range(50):
            taken.append(n)
            yield n

    for n in ahead(str, items(), limit=limit, threads=3):
        assert len(taken) <= int(n) + 1 + limit
    assert taken == list(range(50))


def test_items_are_taken_in_the_callers_thread_and_work_is_not():
    here = threading.get_ident()
    items = (threading.get_ident() for _ in range(3))
    assert all(taken == here != worked for taken, worked in ahead(lambda i: (i, threading.get_ident()), items, limit=2))


def test_an_error_of_the_work_comes_in_its_turn():
    found = ahead(lambda n: 1 // (3 - n), range(9), limit=8)
    assert [next(found) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert list(found) == [] and not threads()


def test_an_error_of_the_items_comes_after_what_stood_before_it():
    def items():
        yield from (1, 2, 3)
        raise ValueError("no fourth")

    seen = []
    with pytest.raises(ValueError, match="no fourth"):
        for n in ahead(abs, items(), limit=8):
            seen.append(n)
    assert seen == [1, 2, 3] and not threads()


def test_where_the_caller_stops_nothing_more_begins():
    begun, closed, first = [], [], threading.Event()

    def items():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    def work(n):
        begun.append(n)
        if n == 1:
            wait(first)
        return n

    found = ahead(work, items(), limit=10, threads=1)
    assert next(found) == 0
    first.set()
    found.close()
    count = len(begun)
    assert closed == [True] and not threads() and count <= 11
    assert len(begun) == count


def test_taken_ahead_takes_the_next_while_the_caller_is_busy():
    taken = [threading.Event() for _ in range(4)]

    def items():
        for n, event in enumerate(taken):
            event.set()
            yield n

    for n in taken_ahead(items(), limit=1):
        for event in taken[n : n + 2]:
            wait(event)
        assert not any(event.is_set() for event in taken[n + 2 :]), "one ahead, no more"
    assert n == 3 and not threads()


def test_taken_ahead_of_nothing_and_of_an_error():
    assert list(taken_ahead([], limit=1)) == []
    found = taken_ahead((1 // n for n in (1, 0)), limit=1)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert not threads()
