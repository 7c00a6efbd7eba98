import threading

import pytest

from core.run.threads import in_threads


def test_results_come_in_order_and_items_are_drawn_as_needed():
    drawn, finished = [], []

    def items():
        for k in range(40):
            drawn.append(k)
            assert len(drawn) - len(finished) <= 2 * 4 + 2
            yield k

    def work(k):
        return k * k

    for result in in_threads(work, items(), 2, "squares", 40):
        finished.append(result)
    assert finished == [k * k for k in range(40)]


def test_first_error_ends_the_whole():
    begun, first = [], threading.Event()

    def work(k):
        begun.append(k)
        if k == 0:
            raise ValueError("zero")
        first.wait(0.01)

    with pytest.raises(ValueError, match="zero"):
        list(in_threads(work, range(1000), 1, "work", 1000))
    assert len(begun) < 10


def test_nothing_to_do():
    assert list(in_threads(str, [], 0, "work", 5, done=5)) == []
