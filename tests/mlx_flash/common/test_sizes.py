"""Sizes: read from text, shown, rounded."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.common.sizes import UNITS, parse_ram, round_up, show, with_margin
from mlx_flash.errors import BudgetError

BYTES = st.integers(1, 2**63 - 1)


@given(BYTES)
def test_numbers_are_bytes(nbytes):
    assert parse_ram(nbytes) == parse_ram(str(nbytes)) == parse_ram(f" {nbytes} B ") == nbytes


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.booleans())
def test_units_multiply(count, unit, lower):
    text = f"{count}{unit.lower() if lower else unit}"
    assert parse_ram(text) == count * UNITS[unit]


@given(BYTES)
def test_what_is_shown_can_be_given(nbytes):
    """And is the size itself, but for the digits that are left out."""
    text = show(nbytes)
    assert re.fullmatch(r"\d+(\.\d+)? (B|KB|MB|GB)", text)
    step = {"B": 1, "KB": 100, "MB": 10**6 if nbytes >= 10**8 else 10**5, "GB": 10**7}
    off = abs(parse_ram(text) - nbytes)
    assert off <= step[text.split()[1]] / 2 + nbytes * 2**-52


@given(BYTES, BYTES)
def test_more_is_not_shown_as_less(a, b):
    a, b = sorted((a, b))
    assert parse_ram(show(a)) <= parse_ram(show(b))


@given(st.text(max_size=12))
def test_text_is_a_size_or_refused(text):
    try:
        assert 0 < parse_ram(text) < 2**63
    except BudgetError as error:
        assert "RAM budget" in str(error)


@pytest.mark.parametrize("size", [0, -1, True, 2**63, 1.5, None, "0", "-1GB", "1e9", "1 G B", "GB"])
def test_what_is_not_a_size(size):
    with pytest.raises(BudgetError, match="RAM budget"):
        parse_ram(size)


@given(st.integers(0, 2**62), st.integers(1, 2**30))
def test_rounding(n, multiple):
    found = round_up(n, multiple)
    assert found % multiple == 0 and n <= found < n + multiple
    assert n + 10**6 <= with_margin(n) < n + 2 * 10**6 and with_margin(n) % 10**6 == 0
