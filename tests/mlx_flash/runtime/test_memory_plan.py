"""Sizes, plans and refusals."""

import dataclasses
from itertools import pairwise

import pytest
from support.budgets import MB, NEEDS, plan

from mlx_flash.common.sizes import parse_ram, show
from mlx_flash.errors import BudgetError
from mlx_flash.runtime.memory_plan import split, spread, way_budgets


def streaming_least(needs):
    return way_budgets(needs)["streamed"]


LEAST = streaming_least(NEEDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (123456789, 123456789),
        ("123456789", 123456789),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        (" 2 gib ", 2 * 2**30),
        (".5G", 500_000_000),
        ("100kb", 100_000),
    ],
)
def test_parse(text, expected):
    assert parse_ram(text) == expected


@pytest.mark.parametrize(
    "text", ["", "GB", "lots", "1.5XB", "-1GB", "1e9", "9" * 400, "0", 0, -5, True, 1.5]
)
def test_parse_refuses(text):
    with pytest.raises(BudgetError):
        parse_ram(text)


def test_show():
    assert [show(n) for n in (0, 900, 1500, 2_500_000, 400 * MB, 3 * 10**9)] == [
        "0 B", "900 B", "1.5 KB", "2.5 MB", "400 MB", "3.00 GB",
    ]  # fmt: skip


def test_plans_never_exceed_the_budget():
    kept = []
    for ram in range(LEAST, NEEDS.dense + 50 * MB, 3 * MB):
        found = plan(ram, NEEDS)
        assert found.total <= ram
        assert sorted(found.kept + found.streamed) == list(range(10))
        assert NEEDS.min_step <= found.step <= NEEDS.max_step
        kept.append(len(found.kept))
    assert kept == sorted(kept)
    assert kept[0] == 0
    assert kept[-1] == 10


def test_two_streamed_layers_are_kept_instead():
    """Two buffers take what two layers take: streaming the last two would buy nothing."""
    counts = {len(plan(ram, NEEDS).streamed) for ram in range(LEAST, NEEDS.dense + MB, MB)}
    assert counts.isdisjoint({1, 2})


def test_least_works_and_less_does_not():
    assert len(plan(LEAST, NEEDS).streamed) == 10
    with pytest.raises(BudgetError, match=r"least that works is 213 MB") as error:
        plan(LEAST - 1, NEEDS)
    for line in ("interpreter", "resident", "KV cache for 4096", "2 streaming buffers", "slack"):
        assert line in str(error.value)
    listed = [float(x.split()[0]) for x in str(error.value).splitlines() if x.startswith("   ")]
    assert sum(listed) == pytest.approx(LEAST / MB, abs=1)


def test_small_models_are_kept_whole():
    needs = dataclasses.replace(NEEDS, layers=(20 * MB,) * 2)
    found = plan(streaming_least(needs), needs)
    assert found.streamed == ()
    with pytest.raises(BudgetError, match="2 of 2 layers"):
        plan(streaming_least(needs) - 1, needs)


def test_larger_than_the_machine():
    with pytest.raises(
        BudgetError, match=r"2\.00 GB is larger than the machine's memory, 1\.00 GB"
    ):
        plan(2 * 10**9, NEEDS, 10**9)


def test_streamed_layers_are_spread():
    assert spread(3, 9) == (1, 4, 7)
    for layers in range(1, 40):
        for count in range(1, layers + 1):
            kept, streamed = split(layers, count)
            assert len(streamed) == count
            assert sorted(kept + streamed) == list(range(layers))
            gaps = [b - a for a, b in pairwise(streamed)]
            assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("lookup", [0, 30 * MB])
@pytest.mark.parametrize("layers", [(20,) * 10, (100, 10, 10), (30, 5, 5, 5), (20, 20)])
def test_the_least_works_and_nothing_less(layers, lookup):
    """Of layers of any sizes, with an embedding that may stay on flash."""
    layers = tuple(size * MB for size in layers)
    needs = dataclasses.replace(
        NEEDS, layers=layers, buffer=max(layers), resident=50 * MB + lookup, lookup=lookup
    )
    found = plan(streaming_least(needs), needs)
    assert found.total <= streaming_least(needs)
    with pytest.raises(BudgetError, match="the least that works"):
        plan(streaming_least(needs) - 1, needs)
    for ram in range(streaming_least(needs), needs.dense + 2 * MB, MB):
        found = plan(ram, needs)
        assert found.total <= ram
        assert found.lookup == bool(found.streamed)
