"""Options are checked when they are made, travel as JSON, and say what contradicts itself."""

import json

import pytest

from mlx_flash import load
from mlx_flash.errors import BudgetError, CacheError
from mlx_flash.runtime.options import PagingOptions, policy_spec

FULL = PagingOptions(
    ram=10**9, context=64, predictor="gate", policy="window:8", lookahead=False, cache_share=0.25
)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ram": 0}, BudgetError, "more than 0"),
        ({"ram": "1GB"}, BudgetError, "a whole number of bytes here, got '1GB'"),
        ({"ram": True}, BudgetError, "is not a size"),
        ({"context": 0}, BudgetError, "at least one token, got 0"),
        ({"kept_share": 1.1}, BudgetError, "kept_share is a share from 0 to 1, got 1.1"),
        ({"cache_share": 0}, BudgetError, "cache_share is a share above 0, at most 1, got 0"),
        ({"kept_share": 0.5, "cache_share": 0.5}, BudgetError, "cache_share has no use"),
        ({"use_flash": False, "cache_share": 0.5}, BudgetError, "so cache_share has no use"),
        ({"use_flash": False, "kept_share": 0.5}, BudgetError, "so kept_share has no use"),
        ({"policy": "fifo"}, CacheError, "expected one of window, lru, lfu"),
        ({"policy": "window:0"}, CacheError, "at least one token"),
        ({"policy": "window:x"}, CacheError, "'window:x': expected a number behind the colon"),
        ({"policy": "lru:3"}, CacheError, "'lru:3': lru takes no number"),
        ({"policy": "window", "lookahead": True}, CacheError, "leave one of them out"),
    ],
)
def test_what_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        PagingOptions(**given)


def test_they_survive_json():
    assert PagingOptions(**json.loads(json.dumps(FULL.to_json()))) == FULL
    assert PagingOptions(**PagingOptions().to_json()) == PagingOptions()


def test_a_copy_is_checked_too():
    assert FULL.replace(ram=5).ram == 5 and FULL.ram == 10**9
    with pytest.raises(BudgetError):
        FULL.replace(kept_share=0.5)


def test_the_policy_and_its_window():
    assert (FULL.policy_name, FULL.window) == ("window", 8)
    assert (PagingOptions().policy_name, PagingOptions(policy="window").window) == ("lfu", 4)
    assert PagingOptions(policy="lfu:64").window == 4, "another policy's number is no window"
    assert [policy_spec("lru"), policy_spec("window"), policy_spec("window", 8)] == [
        "lru", "window", "window:8",
    ]  # fmt: skip
    for policy in ("lru", "window:4"):
        with pytest.raises(CacheError, match="window=8 is for policy 'window'"):
            policy_spec(policy, 8)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"ram": "plenty"}, BudgetError, "is not a size"),
        ({"policy": "lru", "window": 4}, CacheError, "is for policy 'window'"),
        ({"policy": "window", "lookahead": True}, CacheError, "lookahead needs room"),
        ({"kept_share": 0.5, "cache_share": 0.5}, BudgetError, "give one"),
    ],
)
def test_load_refuses_before_it_opens_anything(tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        load(tmp_path / "nowhere", **given)
