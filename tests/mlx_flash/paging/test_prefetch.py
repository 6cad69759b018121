"""Rows brought before their turn: the right bytes whatever was prefetched, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import mlx.core as mx
import numpy as np
import pytest
from support.row_files import make
from support.trained import FIXTURES, TEXT, TRAINED, greedy, logits, whole_rank

from mlx_flash import cli
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import PredictorError, ReadError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging import prefetch, row_stream
from mlx_flash.paging.policies import make_policy
from mlx_flash.paging.prefetch import AccuracyGate, Prefetcher
from mlx_flash.paging.row_stream import RowStream
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors
from mlx_flash.runtime.load import load, load_model
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader
from mlx_flash.storage.row_layout import RowLayout

LAYOUT = RowLayout.plan(("gate", "up", "down"), "F32", 1024)
ROWS, SLOTS = 80, 12


@pytest.fixture
def opened(tmp_path) -> Iterator[tuple[RowReader, list[np.ndarray]]]:
    """(reader, each layer's bytes)."""
    file, layers = make(tmp_path / "rows", LAYOUT, [ROWS, ROWS])
    with closing(RowReader(file, threads=4)) as reader:
        yield reader, layers


def caches(reader: RowReader) -> list[RowCache]:
    return [RowCache(reader, i, SLOTS, make_policy("lfu", ROWS)) for i in range(2)]


def assert_rows(order: np.ndarray, arrays: dict[str, mx.array], block: np.ndarray) -> None:
    for part, extent in zip(LAYOUT.parts, LAYOUT.extents, strict=True):
        expected = block[order, part.offset : part.offset + extent]
        np.testing.assert_array_equal(np.array(arrays[part.name].view(mx.uint8)), expected)


def gate() -> AccuracyGate:
    return AccuracyGate(0.7)


def some(random: np.random.Generator, most: int) -> np.ndarray:
    count = int(random.integers(0, most + 1))
    return np.sort(random.choice(ROWS, count, replace=False)).astype(np.int64)


def test_whatever_was_prefetched_the_rows_are_right(opened):
    """Rows that are right, partly right, too many, of another layer, or none."""
    reader, layers = opened
    stream = RowStream(reader, ROWS)
    most = stream.capacity(0)
    both = caches(reader)
    random = np.random.default_rng(0)
    for _ in range(300):
        layer = int(random.integers(2))
        wanted = some(random, most)
        if random.random() < 0.8:
            guess = wanted[random.random(wanted.size) < random.random()]
            guess = np.union1d(guess, some(random, 6)) if random.random() < 0.7 else guess
            other = random.random() < 0.1
            stream.prefetch(both[layer if not other else 1 - layer], guess, gate())
        with stream.gather(layer, wanted, both[layer]) as (order, arrays):
            assert np.isin(wanted, order).all() and np.unique(order).size == order.size
            assert order.size <= most
            assert_rows(order, arrays, layers[layer])
        slots = both[layer].slots
        held = {name: slots.part(name) for name in slots.memory.arrays}
        assert_rows(slots.rows(), held, layers[layer])
    assert stream.counters.prefetched > stream.counters.prefetch_hits > 0


def test_the_order_does_not_depend_on_what_is_in_slots(opened):
    reader, _ = opened
    stream = RowStream(reader, ROWS)
    guess, wanted = np.array([3, 5, 60]), np.array([2, 5, 7, 60])
    for cached in (np.array([5, 7]), np.array([2, 3, 60])):
        cache = caches(reader)[0]
        with stream.gather(0, cached, cache):
            pass
        stream.prefetch(cache, guess, gate())
        with stream.gather(0, wanted, cache) as (order, _):
            assert order.tolist() == [3, 5, 60, 2, 7]


def test_other_uses_of_the_buffers_forget_it(opened):
    reader, layers = opened
    stream = RowStream(reader, ROWS)
    cache = caches(reader)[0]
    stream.prefetch(cache, np.arange(10), gate())
    for rows, arrays in stream.stream_chunks(1, np.arange(50), None):
        assert_rows(rows, arrays, layers[1])
        stream.retain_until_evaluated(mx.zeros(1))
    with stream.gather(0, np.arange(5, 8), cache) as (order, arrays):
        assert order.tolist() == [5, 6, 7]
        assert_rows(order, arrays, layers[0])


@pytest.mark.parametrize("when", ["prefetched", "asked"])
def test_a_failed_read(opened, monkeypatch, when):
    """It is told when the rows are asked for, and no slot is trusted after that."""
    reader, layers = opened
    stream = RowStream(reader, ROWS)
    cache = caches(reader)[0]
    with stream.gather(0, np.arange(4), cache):
        pass

    def fail(*_: object) -> None:
        raise ReadError(5, "reading rows: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(reader, "_carry_out", fail)
        if when == "prefetched":
            stream.prefetch(cache, np.array([30, 31]), gate())
        wanted = np.array([2, 30]) if when == "prefetched" else np.array([2, 40])
        with pytest.raises(ReadError), stream.gather(0, wanted, cache):
            pass
    assert cache.slots.table.num_used == 0
    stream.prefetch(cache, np.array([30, 31]), gate())
    with stream.gather(0, np.array([2, 30]), cache) as (order, arrays):
        assert_rows(order, arrays, layers[0])


def test_a_caller_that_fails_leaves_no_untrue_slot(opened):
    reader, layers = opened
    stream = RowStream(reader, ROWS)
    cache = caches(reader)[0]
    stream.prefetch(cache, np.arange(6), gate())
    with pytest.raises(KeyboardInterrupt), stream.gather(0, np.arange(4), cache):
        raise KeyboardInterrupt
    assert cache.slots.table.num_used == 0
    with stream.gather(0, np.arange(4), cache) as (order, arrays):
        assert_rows(order, arrays, layers[0])


def spacing(x: np.ndarray) -> np.ndarray:
    """From a bfloat16 number to the next larger one: it has eight bits."""
    return np.exp2(np.floor(np.log2(np.abs(x))) - 7)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (TRAINED[0], "float32"),
        (TRAINED[1], "bfloat16"),
        pytest.param(TRAINED[0], "bfloat16", marks=pytest.mark.whole),
        pytest.param(TRAINED[1], "float32", marks=pytest.mark.whole),
    ],
)
def test_tokens_are_the_same(tmp_path, monkeypatch, name, dtype):
    """Predictors that are right give the dense tokens, with prefetching and without.

    In bfloat16 another order of the same sum may turn a choice between two tokens whose logits are
    next to each other. So there both models are given the dense model's tokens, and all 96 choices
    are compared: they differ in such places only, and in few.
    """
    monkeypatch.setitem(prefetch.LEAST_RIGHT, "neuron", 0)  # however many rows are wrong
    directory = ModelDirectory(convert(FIXTURES / name, tmp_path / "m", dtype=dtype))
    predictor_file.write(directory.path / predictor_file.NAME, whole_rank(directory))
    dense, tokenizer = load(directory.path, use_flash=False)
    prompt = tokenizer.encode(TEXT)
    expected = greedy(dense, prompt, 96)
    steps = (len(prompt), *[1] * 95)
    right = np.array(logits(dense, prompt + expected[:-1], *steps))[-96:]
    assert right.argmax(axis=1).tolist() == expected
    found = {}
    for lookahead in (False, None):  # by default it is on
        options = PagingOptions(cache_share=0.15, lookahead=lookahead)
        model = load_model(directory, options)
        assert model.flash.lookahead == (lookahead is None)
        tokens = greedy(model, prompt, 96)
        found[lookahead] = model.flash.stats()
        if dtype == "float32":
            assert tokens == expected
            continue
        chosen = np.array(logits(model, prompt + expected[:-1], *steps))[-96:].argmax(axis=1)
        other = np.flatnonzero(chosen != expected)
        best, second = right[other].max(axis=1), right[other, chosen[other]]
        assert (best - second <= spacing(best)).all()
        assert other.size <= 4
        first = int(other[0]) if other.size else 96
        assert tokens[:first] == expected[:first]
    assert found[False].foretold == 0
    assert found[None].useful > 0.2 * found[None].foretold > 0
    assert found[None].layer_calls == found[False].layer_calls


def test_prefetching_ends_where_it_is_wrong(tmp_path):
    """Four layers differ too much for it: after some tokens nothing is prefetched any more."""
    directory = ModelDirectory(convert(FIXTURES / TRAINED[1], tmp_path / "m", dtype="float32"))
    predictor_file.write(directory.path / predictor_file.NAME, whole_rank(directory))
    model, tokenizer = load(directory.path, cache_share=0.15)
    greedy(model, tokenizer.encode(TEXT), prefetch.TRIAL + 2)
    prefetchers = [layer.mlp.gather.prefetcher for layer in model.layers]
    assert not any(one.gate.is_open for one in prefetchers[:3])
    assert prefetchers[3] is None, "there is no layer to bring rows for"
    before = model.flash.stats().foretold
    greedy(model, tokenizer.encode(TEXT), 20)
    assert model.flash.stats().foretold == before > 0


def test_a_gate_shuts_where_too_many_rows_are_wrong():
    neurons, experts = (AccuracyGate(prefetch.LEAST_RIGHT[unit]) for unit in ("neuron", "expert"))
    for one in (neurons, experts):
        for _ in range(prefetch.TRIAL - 1):
            one.count(10, 0)
        assert one.is_open, "too few steps to know"
        one.count(10, 10)
    assert not neurons.is_open and experts.is_open
    for _ in range(100):
        neurons.count(10, 9)
    assert neurons.is_open


def test_a_prefetcher_predicts_while_its_gate_is_open():
    brought, one = [], AccuracyGate(0.5)
    prefetcher = Prefetcher(lambda x: x * 2, lambda rows, told: brought.append((rows, told)), one)
    prefetcher.bring(prefetcher.predict(mx.array([[3, 1], [3, 0]])))
    prefetcher.bring(prefetcher.predict(np.array([1, 2])))
    assert [rows.tolist() for rows, _ in brought] == [[0, 2, 6], [2, 4]]
    assert all(told is one for _, told in brought)
    for _ in range(prefetch.TRIAL):
        one.count(1, 0)
    assert prefetcher.predict(mx.array([1])) is None
    prefetcher.bring(None)
    assert len(brought) == 2


def test_nothing_is_allocated_once_it_runs(tmp_path, monkeypatch):
    """Slots and buffers are there from the start: 60 tokens later no array of rows is new."""
    directory = ModelDirectory(convert(FIXTURES / TRAINED[1], tmp_path / "m", dtype="float32"))
    predictor_file.write(directory.path / predictor_file.NAME, whole_rank(directory))
    made: list[int] = []
    real = row_stream.SlotMemory

    def counted(*args: object, **kwargs: object):
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(row_stream, "SlotMemory", counted)
    model, tokenizer = load(directory.path, cache_share=0.15)
    prompt = tokenizer.encode(TEXT)
    greedy(model, prompt, 20)
    before, held = len(made), mx.get_active_memory()
    greedy(model, prompt, 60)
    assert len(made) == before
    assert mx.get_active_memory() - held < directory.rows.layers[0].rows * 4096 / 100


def test_asked_for_where_it_has_no_use(tmp_path, capsys):
    path = convert(FIXTURES / TRAINED[1], tmp_path / "m", dtype="float32")
    with pytest.raises(PredictorError, match="predictor gate"):
        load_model(ModelDirectory(path), PagingOptions(lookahead=True))
    assert cli.main(["generate", "--model", str(path), "--prompt", "x", "--lookahead"]) == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["lfu", "window"])
def test_a_token_that_names_no_row_of_a_quantised_model(tmp_path, policy):
    """MLX's quantised products crash on no rows: they are not asked for any."""
    path = convert(
        FIXTURES / TRAINED[1], tmp_path / "m", dtype="float32", quantize=True, q_group_size=32
    )
    directory = ModelDirectory(path)
    layers = []
    for layer in directory.rows.layers:
        tensors = {
            "first": mx.zeros((4, directory.d_model)),
            "second": mx.zeros((layer.rows, 4)),
            "bias": mx.full((layer.rows,), -1e9),
        }
        layers.append(LayerPredictor("low-rank", 0.5, "none", tensors, {"4": layer.rows / 5}))
    predictors = Predictors("low-rank", directory.rows.fingerprint, layers, {})
    predictor_file.write(path / predictor_file.NAME, predictors)
    model = load_model(directory, PagingOptions(cache_share=0.15, policy=policy))
    assert len(greedy(model, [5, 6, 7], 4)) == 4
    assert model.flash.stats().bytes_read == 0
