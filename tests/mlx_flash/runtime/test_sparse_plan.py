"""Plans for models whose rows are predicted."""

import dataclasses

import pytest
from support.budgets import MACHINE, MB, NEEDS, plan

from mlx_flash.errors import BudgetError
from mlx_flash.runtime.memory_requirements import PagingRequirements

SPARSE = PagingRequirements(
    predictors=(MB,) * 10,
    slots=(20_000,) * 10,
    rows=(1000,) * 10,
    demand=(100.0,) * 5 + (300.0,) * 5,
    buffers=10 * MB,
)
LEAST = NEEDS.fixed + NEEDS.reader + 10 * MB + 10 * MB + 10 * 20 * 20_000 + NEEDS.workspace(16)


def paged(ram, sparse=SPARSE, predictor="gate"):
    return plan(ram, NEEDS.replace(paging=sparse), predictor=predictor)


def test_least():
    found = paged(LEAST, SPARSE)
    assert set(found.slots.values()) == {20}
    assert found.total == LEAST and found.kept == found.streamed == ()
    with pytest.raises(BudgetError, match="without predictors the least is") as info:
        paged(LEAST - 1, SPARSE)
    assert "predictors" in str(info.value) and "cached FFN rows, 2 % of 10 layers" in str(
        info.value
    )


@pytest.mark.parametrize("extra", [1, 5, 20, 60, 110, 150])
def test_the_budget_is_used_and_kept(extra):
    ram = LEAST + extra * MB
    found = paged(ram, SPARSE)
    assert found.total <= ram
    if ram < NEEDS.dense:
        assert found.slots
    assert sorted([*found.kept, *found.slots]) == list(range(10))
    few, many = found.slots.get(0, 1000), found.slots.get(9, 1000)
    if few > 20 and many < 1000:
        assert many == pytest.approx(3 * few, abs=3), "as their demands are to each other"
    assert few <= many
    unused = ram - found.total
    assert not found.slots or unused < 11 * 20_000 + len(found.kept) * MB


def test_a_layer_whose_rows_all_fit_is_kept():
    found = paged(LEAST + 160 * MB, SPARSE)
    assert found.kept == (5, 6, 7, 8, 9)
    assert set(found.slots) == {0, 1, 2, 3, 4}
    assert found.bytes_of("predictors") == 5 * MB


def test_everything_fits():
    found = paged(NEEDS.dense, SPARSE)
    assert len(found.kept) == 10 and not found.slots


def test_more_than_the_machine_has():
    with pytest.raises(BudgetError, match="larger than the machine's memory"):
        paged(MACHINE + 1, SPARSE)


def test_longer_chunks_get_a_share():
    steps = [paged(LEAST + n * MB, SPARSE).step for n in (0, 10, 40, 80)]
    assert steps == sorted(steps) and steps[0] == 16 < steps[-1]


def test_a_layer_without_demand():
    sparse = dataclasses.replace(SPARSE, demand=(0.0,) * 10)
    found = paged(LEAST + 50 * MB, sparse)
    assert found.total <= LEAST + 50 * MB
