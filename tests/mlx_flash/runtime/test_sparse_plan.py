"""Plans for models whose rows are predicted."""

import dataclasses

import pytest
from support.budgets import MACHINE, MB, NEEDS

from mlx_flash.errors import BudgetError
from mlx_flash.runtime.memory_plan import PagingRequirements, make_sparse_plan

SPARSE = PagingRequirements(
    predictors=(MB,) * 10,
    slots=(20_000,) * 10,
    rows=(1000,) * 10,
    demand=(100.0,) * 5 + (300.0,) * 5,
    buffers=10 * MB,
)
LEAST = NEEDS.fixed + NEEDS.reader + 10 * MB + 10 * MB + 10 * 20 * 20_000 + NEEDS.workspace(16)


def test_least():
    plan = make_sparse_plan(LEAST, NEEDS, SPARSE, MACHINE)
    assert set(plan.slots.values()) == {20}
    assert plan.total == LEAST and plan.kept == plan.streamed == ()
    with pytest.raises(BudgetError, match="without predictors the least is") as info:
        make_sparse_plan(LEAST - 1, NEEDS, SPARSE, MACHINE)
    assert "predictors" in str(info.value) and "cached FFN rows, 2 % of 10 layers" in str(
        info.value
    )


@pytest.mark.parametrize("extra", [1, 5, 20, 60, 110, 150])
def test_the_budget_is_used_and_kept(extra):
    ram = LEAST + extra * MB
    plan = make_sparse_plan(ram, NEEDS, SPARSE, MACHINE)
    assert plan.total <= ram
    if ram < NEEDS.dense:
        assert plan.slots
    assert sorted([*plan.kept, *plan.slots]) == list(range(10))
    few, many = plan.slots.get(0, 1000), plan.slots.get(9, 1000)
    if few > 20 and many < 1000:
        assert many == pytest.approx(3 * few, abs=3), "as their demands are to each other"
    assert few <= many
    unused = ram - plan.total
    assert not plan.slots or unused < 11 * 20_000 + len(plan.kept) * MB


def test_a_layer_whose_rows_all_fit_is_kept():
    plan = make_sparse_plan(LEAST + 160 * MB, NEEDS, SPARSE, MACHINE)
    assert plan.kept == (5, 6, 7, 8, 9)
    assert set(plan.slots) == {0, 1, 2, 3, 4}
    assert plan.table["predictors"] == 5 * MB


def test_everything_fits():
    plan = make_sparse_plan(NEEDS.dense, NEEDS, SPARSE, MACHINE)
    assert len(plan.kept) == 10 and not plan.slots


def test_more_than_the_machine_has():
    with pytest.raises(BudgetError, match="larger than the machine's memory"):
        make_sparse_plan(MACHINE + 1, NEEDS, SPARSE, MACHINE)


def test_longer_chunks_get_a_share():
    steps = [make_sparse_plan(LEAST + n * MB, NEEDS, SPARSE, MACHINE).step for n in (0, 10, 40, 80)]
    assert steps == sorted(steps) and steps[0] == 16 < steps[-1]


def test_a_layer_without_demand():
    sparse = dataclasses.replace(SPARSE, demand=(0.0,) * 10)
    plan = make_sparse_plan(LEAST + 50 * MB, NEEDS, sparse, MACHINE)
    assert plan.total <= LEAST + 50 * MB
