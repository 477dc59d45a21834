"""Reading in advance: order, one item ahead, errors where they belong."""

from __future__ import annotations

import threading

import pytest

from braggflux.merge.stream.prefetch import read_ahead


def test_items_come_in_order_and_in_another_thread():
    threads = set()

    def read(key):
        threads.add(threading.get_ident())
        return key**2

    assert list(read_ahead(read, range(5))) == [(k, k**2) for k in range(5)]
    assert threading.get_ident() not in threads
    assert list(read_ahead(read, [])) == []


def test_the_next_item_is_read_while_this_one_is_used_and_no_more():
    started = [threading.Event() for _ in range(4)]

    def read(key):
        started[key].set()
        return key

    items = read_ahead(read, range(4))
    assert next(items) == (0, 0)
    assert started[1].wait(5)
    assert not started[2].is_set()
    items.close()
    assert not started[2].is_set()


def test_an_error_is_raised_at_its_item():
    def read(key):
        if key == 2:
            raise OSError("disk")
        return key

    items = read_ahead(read, range(4))
    assert [next(items), next(items)] == [(0, 0), (1, 1)]
    with pytest.raises(OSError, match="disk"):
        next(items)
