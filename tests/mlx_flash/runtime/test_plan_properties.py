"""Plans of any made-up model under any budget: never above it, and none below the least."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.budgets import MB, NEEDS

from mlx_flash.common.sizes import show, with_margin
from mlx_flash.errors import BudgetError
from mlx_flash.runtime.memory_plan import least_budget, plan_for, way_budgets
from mlx_flash.runtime.memory_requirements import MemoryRequirements, PagingRequirements
from mlx_flash.runtime.options import PagingOptions

MACHINE = 1 << 50
SIZES = st.integers(0, 50 * MB)


@st.composite
def paging(draw, layers):
    """What reading single rows of a model's layers takes."""

    def each(strategy):
        return tuple(draw(st.lists(strategy, min_size=layers, max_size=layers)))

    rows = each(st.integers(1, 300))
    experts = draw(st.booleans())
    curves = None
    if experts and draw(st.booleans()):
        curves = tuple(
            tuple(sorted(draw(st.lists(st.floats(0, 9), min_size=n + 1, max_size=n + 1)))[::-1])
            for n in rows
        )
    return PagingRequirements(
        predictors=(0,) * layers if experts else each(SIZES),
        slots=each(st.integers(1, MB)),
        rows=rows,
        demand=each(st.floats(0, 300)),
        buffers=draw(SIZES),
        experts=experts,
        curves=curves,
    )


@st.composite
def models(draw):
    """Memory requirements of any model, whether or not one like it could exist."""
    layers = draw(st.integers(1, 12))
    base, slope = draw(SIZES), draw(st.integers(0, MB))
    lookup = draw(SIZES)
    return MemoryRequirements(
        process=draw(SIZES),
        resident=lookup + draw(SIZES),
        kv_cache=draw(SIZES),
        context=draw(st.integers(1, 5000)),
        reader=draw(SIZES),
        slack=draw(SIZES),
        layers=tuple(draw(st.lists(SIZES, min_size=layers, max_size=layers))),
        buffer=draw(SIZES),
        buffers=min(2, layers),
        workspace=lambda step: base + step * slope,
        lookup=lookup,
        paging=draw(st.none() | paging(layers)),
    )


choices = st.builds(
    PagingOptions, use_flash=st.booleans(), predictor=st.sampled_from(["auto", "none", "gate"])
)
# Slots for the fewest rows take most of the budget: a chunk's share must not come out of them.
CROWDED = NEEDS.replace(
    paging=PagingRequirements((0,), (MB,), (5000,), (1.0,), 0), layers=(8000 * MB,)
)


@settings(max_examples=300, deadline=None)
@given(models(), choices, st.integers(0, 600 * MB))
@example(CROWDED, PagingOptions(), 2 * MB)
@example(CROWDED, PagingOptions(predictor="gate"), 20 * MB)
def test_a_plan_is_within_its_budget(needs, options, beyond):
    least = least_budget(needs, options)
    ram = max(1, least + beyond)
    plan = plan_for(needs, options.replace(ram=ram), MACHINE)
    assert plan.total <= ram
    assert sorted([*plan.kept, *plan.streamed, *plan.slots]) == list(range(len(needs.layers)))
    assert needs.min_step <= plan.step <= needs.max_step
    assert all(line.bytes >= 0 for line in plan.lines)
    assert len({line.label for line in plan.lines}) == len(plan.lines)
    if plan.slots:
        assert needs.paging is not None and not plan.streamed
        least_slots = needs.paging.least_slots
        assert all(least_slots[i] <= n < needs.paging.rows[i] for i, n in plan.slots.items())
    if not options.use_flash:
        assert not plan.streamed and not plan.slots


@settings(max_examples=200, deadline=None)
@given(models(), choices)
def test_no_plan_below_the_least(needs, options):
    least = least_budget(needs, options)
    if least > 1:
        with pytest.raises(BudgetError, match=r"is too small|the dense model needs") as error:
            plan_for(needs, options.replace(ram=least - 1), MACHINE)
        if options.use_flash:
            assert f"the least that works is {show(with_margin(least))}:" in str(error.value)


@settings(max_examples=100, deadline=None)
@given(models())
def test_the_least_is_the_smallest_of_the_ways(needs):
    ways = way_budgets(needs)
    assert least_budget(needs, PagingOptions()) == min(ways.values())
    assert ways["resident"] == needs.dense
    assert ("paged" in ways) == (needs.paging is not None)
    assert ("streamed" in ways) == (needs.paging is None or not needs.paging.experts)


def test_a_plan_changed_in_one_place():
    plan = plan_for(NEEDS, PagingOptions(ram=200 * MB, kept_share=0.5), MACHINE)
    other = plan.replace(step=16)
    assert (other.step, other.lines, plan.step) == (16, plan.lines, NEEDS.max_step)
