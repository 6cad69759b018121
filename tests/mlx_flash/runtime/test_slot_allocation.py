"""Slots shared out, against every way there is to share them out."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.runtime.slot_allocation import allocate_slots, envelope

drops = st.lists(st.integers(0, 12), max_size=5)
ANY = drops.map(lambda d: [sum(d[i:]) for i in range(len(d) + 1)])
CONVEX = drops.map(lambda d: [sum(sorted(d)[: len(d) - i]) for i in range(len(d) + 1)])
SIZES = st.integers(1, 9)


@st.composite
def layers(draw, curves=ANY, sizes=SIZES):
    """(curves, bytes of a slot, least slots, room) for one to three layers."""
    count = draw(st.integers(1, 3))
    found = draw(st.lists(curves, min_size=count, max_size=count))
    size = draw(st.lists(sizes, min_size=count, max_size=count))
    least = [draw(st.integers(0, len(c) - 1)) for c in found]
    room = sum(n * s for n, s in zip(least, size, strict=True)) + draw(st.integers(0, 60))
    return found, size, least, room


def spent(counts, sizes):
    return sum(n * size for n, size in zip(counts, sizes, strict=True))


def misses(curves, counts):
    return sum(curve[n] for curve, n in zip(curves, counts, strict=True))


@given(ANY)
def test_the_envelope_is_the_largest_convex_curve_below(curve):
    """At any place, the lowest line between two points of the curve on either side of it."""
    expected = [
        min(
            np.interp(x, [a, b], [curve[a], curve[b]])
            for a in range(x + 1)
            for b in range(x, len(curve))
        )
        for x in range(len(curve))
    ]
    np.testing.assert_allclose(envelope(curve), expected, atol=1e-9)


@given(layers())
def test_what_any_allocation_keeps_to(given):
    curves, sizes, least, room = given
    counts = allocate_slots(curves, sizes, least, room)
    assert spent(counts, sizes) <= room
    for curve, count, first in zip(curves, counts, least, strict=True):
        assert first <= count <= len(curve) - 1
    if spent([len(c) - 1 for c in curves], sizes) <= room:
        assert counts == tuple(len(c) - 1 for c in curves), "room was left empty"


def ways(curves, sizes, least, room):
    """Every allocation within the room."""
    ranges = (range(first, len(c)) for c, first in zip(curves, least, strict=True))
    return (counts for counts in product(*ranges) if spent(counts, sizes) <= room)


@given(layers(CONVEX))
def test_nothing_within_the_same_bytes_misses_less(given):
    """Of convex curves, as more slots bring less and less."""
    curves, sizes, least, room = given
    counts = allocate_slots(curves, sizes, least, room)
    best = min(misses(curves, w) for w in ways(curves, sizes, least, spent(counts, sizes)))
    assert misses(curves, counts) == best


@given(layers(CONVEX, sizes=st.just(3)))
def test_slots_of_one_size_are_shared_out_as_well_as_can_be(given):
    curves, sizes, least, room = given
    counts = allocate_slots(curves, sizes, least, room)
    assert misses(curves, counts) == min(
        misses(curves, w) for w in ways(curves, sizes, least, room)
    )


def test_layers_that_nobody_asks_fill_up_evenly():
    assert allocate_slots([[0] * 9] * 4, [2] * 4, [1] * 4, 40) == (5, 5, 5, 5)


def test_steep_layers_come_first():
    steep, flat = [90, 30, 0], [3, 2, 1, 0]
    assert allocate_slots([steep, flat], [1, 1], [0, 0], 3) == (2, 1)
    assert allocate_slots([flat, steep], [1, 1], [0, 0], 3) == (1, 2)
    with pytest.raises(ValueError):
        allocate_slots([steep], [1, 1], [0], 3)
