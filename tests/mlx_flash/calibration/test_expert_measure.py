"""What experts are asked for: counting, sharing slots out, and calibrating mixtures."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from support.platforms import fix_memory
from support.tiny_mixtures import make_mixture

from mlx_flash import cli
from mlx_flash.calibration import report_files
from mlx_flash.calibration.calibrate import calibrate
from mlx_flash.calibration.experts import trace as trace_module
from mlx_flash.calibration.experts.figures import (
    Asked,
    distinct,
    foretold_share,
    layer_figures,
    top_share,
)
from mlx_flash.calibration.experts.stack_distance import depths, misses, within
from mlx_flash.common.files import is_temporary
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError, CalibrationError, DamagedError, PredictorError
from mlx_flash.model_directory import expert_demand_file
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import mixtures
from mlx_flash.paging.policies import LFU, LRU, Belady, Policy, SlidingWindow
from mlx_flash.paging.slots.slot_table import SlotTable
from mlx_flash.runtime.load import load_model, load_tokenizer
from mlx_flash.runtime.memory_plan import way_budgets
from mlx_flash.runtime.memory_requirements import (
    PagingRequirements,
    memory_requirements,
    paging_requirements,
)
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.runtime.slot_allocation import allocate_slots, envelope
from mlx_flash.storage.reader import RowReader

EXPERTS, TOP_K = 16, 2
CONTEXT = 200
UNEVEN = 1  # the layer whose router knows few experts
WORDS = "the brown fox and the other hound ran over the hill in the morning. "


class Ordered(Policy):
    """A policy whose ties fall by row number, so that two simulations may be compared."""

    def __init__(self, policy):
        self._policy = policy
        self.is_window = policy.is_window
        self.used, self.expired = policy.used, policy.expired

    def rank(self, rows):
        return np.asarray(self._policy.rank(rows), float) - np.asarray(rows) * 1e-9


def traces(rows, most, steps=200):
    random = np.random.default_rng(rows)
    weights = random.dirichlet(np.full(rows, 0.7)) + 0.01
    weights /= weights.sum()
    return [
        np.sort(random.choice(rows, random.integers(1, most + 1), replace=False, p=weights))
        for _ in range(steps)
    ]


def counted(trace, rows, capacity, policy):
    table, found = SlotTable(rows, capacity), 0
    for active in trace:
        found += int((table.slot_of[active] < 0).sum())
        table.update(active[table.admit(active, policy)], policy, told=True)
    return found / len(trace)


@pytest.mark.parametrize(("rows", "most"), [(8, 2), (12, 4), (20, 1)])
def test_one_pass_gives_the_misses_of_every_capacity(rows, most):
    trace = traces(rows, most)
    for make in (LRU, LFU, lambda n: LFU(n, 8), lambda n: Belady(n, trace)):
        found = misses(depths(trace, rows, Ordered(make(rows))), rows)
        assert found.size == rows + 1
        assert found[0] == pytest.approx(sum(a.size for a in trace) / len(trace))
        for capacity in range(1, rows + 1):
            expected = counted(trace, rows, capacity, Ordered(make(rows)))
            assert found[capacity] == pytest.approx(expected), capacity


def test_a_window_lets_go_of_what_is_old():
    trace = traces(12, 3)
    for window in (1, 3, 6):
        lru = depths(trace, 12, Ordered(LRU(12)))
        found = misses(within(lru, trace, window), 12)
        for capacity in range(3, 13):
            expected = counted(trace, 12, capacity, Ordered(SlidingWindow(12, window)))
            assert found[capacity] == pytest.approx(expected)


def test_the_envelope_is_convex_and_below():
    random = np.random.default_rng(1)
    for _ in range(20):
        curve = np.sort(random.random(30))[::-1]
        hull = envelope(curve)
        assert (hull <= curve + 1e-12).all() and hull[0] == curve[0] and hull[-1] == curve[-1]
        assert (np.diff(hull, 2) >= -1e-12).all()
    assert envelope([3.0]).tolist() == [3.0]


def test_slots_go_where_they_save_most():
    convex = [[8, 4, 2, 1, 0.5], [3, 1, 0, 0, 0], [1, 0.9, 0.8, 0.7, 0.6]]
    best = {}
    for room in range(13):
        found = allocate_slots(convex, (1, 1, 1), (0, 0, 0), room)
        assert sum(found) == room
        options = [
            (a, b, c)
            for a in range(5) for b in range(5) for c in range(5) if a + b + c == room
        ]  # fmt: skip
        best = min(sum(curve[n] for curve, n in zip(convex, o, strict=True)) for o in options)
        total = sum(curve[n] for curve, n in zip(convex, found, strict=True))
        assert total == pytest.approx(best), room


def test_slots_of_several_sizes_and_the_least_of_each():
    curves = [[4, 2, 1, 0]] * 2
    assert allocate_slots(curves, (1, 10), (1, 1), 11 + 2) == (3, 1)
    assert allocate_slots(curves, (1, 10), (1, 1), 11 + 12) == (3, 2)
    assert allocate_slots(curves, (1, 10), (1, 1), 1000) == (3, 3)
    assert allocate_slots(curves, (1, 10), (1, 1), 0) == (1, 1), (
        "the caller has seen that the least fits"
    )


def test_where_nothing_was_asked_layers_fill_up_evenly():
    curves = [[2, 0, 0, 0, 0, 0, 0, 0, 0]] * 4
    assert allocate_slots(curves, (1,) * 4, (1,) * 4, 20) == (5, 5, 5, 5)


def test_curves_take_the_place_of_demand():
    common = ((0, 0), (10, 10), (4, 4), (4.0, 4.0), 0)
    assert PagingRequirements(*common).capacities(40) == (2, 2)
    curves = ((2, 2, 2, 2, 1.9), (2, 1, 0.2, 0.1, 0))
    needs = PagingRequirements(*common, curves=curves)
    assert needs.capacities(40) == (1, 3)
    assert needs.bytes_of(needs.capacities(47)) <= 47


def asked(seed=0, sequences=3, tokens=40, experts=EXPERTS, k=TOP_K):
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.full(experts, 0.5))
    order = np.log(weights) + random.gumbel(size=(sequences, tokens, experts))
    chosen = np.argsort(-order, axis=-1)[..., :k].astype(np.uint16)
    return Asked(experts, chosen, np.roll(chosen, 1, axis=1))


def test_figures_against_brute_force():
    found = asked()
    counts = distinct(found.active())
    for window in range(1, 9):
        sizes = [
            len({int(n) for token in sequence[at : at + window] for n in token})
            for sequence in found.chosen
            for at in range(len(sequence) - window + 1)
        ]
        assert counts[str(window)] == pytest.approx(np.mean(sizes))
    uses = np.bincount(found.chosen.reshape(-1), minlength=EXPERTS)
    assert top_share(found.active()) == pytest.approx(np.sort(uses)[-4:].sum() / uses.sum())
    shared = [
        len({*map(int, a)} & {*map(int, b)})
        for a, b in zip(
            found.chosen.reshape(-1, TOP_K), found.foretold.reshape(-1, TOP_K), strict=True
        )
    ]
    assert foretold_share(found) == pytest.approx(np.mean(shared) / TOP_K)
    assert foretold_share(Asked(EXPERTS, found.chosen)) is None
    figures = layer_figures(found)
    assert figures["per_token"] == TOP_K and figures["asked_for"] == (uses > 0).sum()
    assert figures["misses"] == sorted(figures["misses"], reverse=True)
    assert all(n <= 1 for n in figures["hits_over_belady"]["lru"])
    json.dumps(figures)


def test_tokens_fewer_than_a_window():
    assert list(distinct(asked(tokens=3).active())) == ["1", "2", "3"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(random.choice(WORDS.split(), 3000)))
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A mixture whose routers choose at random, but that one of them knows four experts."""
    path = make_mixture(
        tmp_path_factory.mktemp("hf"),
        "qwen3_moe",
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=3,
        mlp_only_layers=[],
    )
    before = f"model.layers.{UNEVEN}."
    for file in path.glob("*.safetensors"):
        weights = dict(mx.load(str(file)))
        for name, w in weights.items():
            if name == before + "mlp.gate.weight":
                sides = np.zeros(w.shape, np.float32)
                sides[:TOP_K, 0], sides[TOP_K : 2 * TOP_K, 0] = 10, -10
                weights[name] = 0.05 * w + mx.array(sides)
            elif name == before + "post_attention_layernorm.weight":
                weights[name] = mx.concatenate([mx.array([30.0]), w[1:]])
        mx.eval(weights)
        mx.save_safetensors(str(file), weights, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def calibrated(source, words, tmp_path_factory):
    """(model directory, report)."""
    path = convert(str(source), tmp_path_factory.mktemp("demand") / "flash")
    return path, calibrate(path, words, tokens=1024)


def curves_of(path):
    return expert_demand_file.curves_of(ModelDirectory(path))


def needs_for(path, curves=None):
    return paging_requirements(ModelDirectory(path), None, curves)


def test_an_uneven_layer_gets_fewer_slots(calibrated):
    path, found = calibrated
    shares = [layer["top_share"] for layer in found["layers"]]
    assert shares[UNEVEN] > 0.95 > 0.9 > max(shares[0], shares[2])
    assert found["used"] == "measured"
    curves = curves_of(path)
    needs = needs_for(path, curves)
    room = needs.bytes_of([EXPERTS // 2] * 3)
    slots = needs.capacities(room)
    assert needs.bytes_of(slots) <= room
    assert slots[UNEVEN] < min(slots[0], slots[2])
    for misses_ in found["splits"]["misses"].values():
        assert misses_ == sorted(misses_, reverse=True)


def budget_for(path, slots):
    """The RAM budget that buys so many slots of each layer, with nothing else in the process."""
    directory = ModelDirectory(path)
    reader = RowReader(directory.rows)
    try:
        needs = memory_requirements(directory, reader, PagingOptions(context=CONTEXT))
    finally:
        reader.close()
    paging = needs.paging
    more = paging.bytes_of(slots) - paging.bytes_of(paging.least_slots)
    return way_budgets(needs)["paged"] + more


def loaded(path, slots, predictor):
    return load_model(
        ModelDirectory(path),
        PagingOptions(ram=budget_for(path, slots), context=CONTEXT, predictor=predictor),
    )


def real_misses(path, tokens, predictor):
    """(slots, experts read for tokens one by one) with memory for half of the experts."""
    model = loaded(path, [EXPERTS // 2] * 3, predictor)
    cache = make_prompt_cache(model)
    for token in tokens:
        mx.eval(model(mx.array([[int(token)]]), cache=cache))
    stats = model.flash.stats()
    model.flash.close()
    return model.flash.plan.slots, stats.misses


def test_the_split_saves_reads_and_none_means_equal_shares(calibrated, words, monkeypatch):
    fix_memory(monkeypatch, process=100_000_000)
    path, _ = calibrated
    tokenizer = load_tokenizer(ModelDirectory(path))
    tokens = tokenizer.encode(words.read_text()[-2000:], add_special_tokens=False)[:150]
    equal, many = real_misses(path, tokens, "none")
    split, few = real_misses(path, tokens, "auto")
    assert set(equal.values()) == {EXPERTS // 2}
    assert sum(split.values()) == sum(equal.values()) and split[UNEVEN] < equal[UNEVEN]
    assert few < many


def test_the_recording_is_what_the_routers_choose(calibrated, words):
    """Against mlx-lm's dense model, its router written out."""
    path, _ = calibrated
    directory = ModelDirectory(path)
    tokens = np.arange(3, 60, dtype=np.int32)
    model = load_model(directory, PagingOptions(cache_share=0.3, predictor="none"))
    found = trace_module.Recorder(model, TOP_K).run(tokens, 16)
    model.flash.close()
    dense = load_model(directory, PagingOptions(use_flash=False))
    seen = []
    for layer in dense.layers:
        layer.mlp = Spy(layer.mlp, seen)
    dense(mx.array(tokens[None]))
    for i, (x, mlp) in enumerate(seen):
        logits = np.array(mlp.gate(x)[0])
        expected = np.sort(np.argsort(-logits, axis=-1)[:, :TOP_K], axis=-1)
        assert (np.sort(found[f"chosen-{i}"], axis=-1) == expected).mean() > 0.99
        if i:
            guess = np.argsort(-np.array(mlp.gate(seen[i - 1][0])[0]), axis=-1)[:, :TOP_K]
            same = np.sort(found[f"foretold-{i}"], axis=-1) == np.sort(guess, axis=-1)
            assert same.mean() > 0.99
    assert "foretold-0" not in found


@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4", "longcat_flash", "deepseek_v3"])
def test_families_that_route_in_other_ways(model_type, tmp_path):
    path = convert(str(make_mixture(tmp_path / "hf", model_type)), tmp_path / "flash")
    directory = ModelDirectory(path)
    _, top_k = mixtures.expert_counts(directory.config, directory.mixture)
    found = []
    for share in (0.3, 1.0):
        model = load_model(directory, PagingOptions(cache_share=share))
        found.append(trace_module.Recorder(model, top_k).run(np.arange(3, 43, dtype=np.int32), 16))
        model.flash.close()
    layers = range(len(directory.rows.layers))
    assert {f"chosen-{i}" for i in layers} <= found[0].keys() == found[1].keys()
    for name, array in found[0].items():
        assert array.shape == (40, top_k)
        assert array.max() < directory.rows.layers[0].rows
        assert (np.sort(array) == np.sort(found[1][name])).mean() > 0.99, "slots change nothing"


class Spy(nn.Module):
    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self._seen = inner, seen

    def __call__(self, x):
        self._seen.append((x, self.inner))
        return self.inner(x)


def test_report_and_file(calibrated):
    path, found = calibrated
    assert json.loads((path / report_files.JSON).read_text()) == found
    text = (path / report_files.TABLE).read_text()
    assert "by curves of misses" in text and "shared out by the curves" in text
    if found["plot"] == report_files.PLOT:
        assert (path / report_files.PLOT).read_bytes().startswith(b"\x89PNG")
    assert not any(map(is_temporary, path.iterdir()))
    assert not path.with_name(path.name + ".calibrating").exists()
    assert [layer["foretold"] is None for layer in found["layers"]] == [True, False, False]


def test_the_same_seed_gives_the_same_file(calibrated, words):
    path, _ = calibrated
    before = (path / expert_demand_file.NAME).read_bytes()
    calibrate(path, words, tokens=1024)
    assert (path / expert_demand_file.NAME).read_bytes() == before


def test_interrupted_it_goes_on(source, words, tmp_path, calibrated, monkeypatch):
    path = convert(str(source), tmp_path / "flash")
    run, calls = trace_module.Recorder.run, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *args)

    monkeypatch.setattr(trace_module.Recorder, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        calibrate(path, words, tokens=1024)
    assert not (path / expert_demand_file.NAME).exists() and not (path / report_files.JSON).exists()
    found = calibrate(path, words, tokens=1024)
    total = found["text"]["train_tokens"] + found["text"]["validation_tokens"]
    total += found["text"]["held_out_tokens"]
    assert len(calls) == 4 + total // found["text"]["sequence"] - 3, "three were kept"
    assert (path / expert_demand_file.NAME).read_bytes() == (
        calibrated[0] / expert_demand_file.NAME
    ).read_bytes()


def copied(path, out):
    out.mkdir()
    for file in path.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_a_file_of_another_model_is_refused(calibrated, tmp_path, words):
    path = copied(calibrated[0], tmp_path / "m")
    demand = expert_demand_file.read_for(ModelDirectory(path))
    other = expert_demand_file.ExpertDemand("0" * 64, True, demand.curves, demand.measured)
    expert_demand_file.write(path / expert_demand_file.NAME, other)
    with pytest.raises(PredictorError, match=r"another conversion of it \(rows 0000.*calibrate ag"):
        load_model(ModelDirectory(path), PagingOptions(cache_share=0.5))
    short = expert_demand_file.ExpertDemand(demand.rows_fingerprint, True, demand.curves[1:])
    expert_demand_file.write(path / expert_demand_file.NAME, short)
    with pytest.raises(PredictorError, match="has figures for"):
        load_model(ModelDirectory(path), PagingOptions(cache_share=0.5))
    load_model(ModelDirectory(path), PagingOptions(cache_share=0.5, predictor="none")).flash.close()
    calibrate(path, words, tokens=1024)
    load_model(ModelDirectory(path), PagingOptions(cache_share=0.5)).flash.close()


def test_a_damaged_file_is_refused(calibrated, tmp_path, capsys):
    path = copied(calibrated[0], tmp_path / "m")
    file = path / expert_demand_file.NAME
    assert cli.main(["verify", "--model", str(path)]) == 0
    file.write_text(re.sub(r'"tokens": \d+', '"tokens": 7', file.read_text()))
    with pytest.raises(DamagedError, match="is damaged"):
        load_model(ModelDirectory(path), PagingOptions(cache_share=0.5))
    assert cli.main(["verify", "--model", str(path)]) == 1
    file.write_text("{")
    assert cli.main(["verify", "--model", str(path)]) == 1
    file.write_text('{"sha256": ""}')
    with pytest.raises(PredictorError, match="not written by mlx_flash"):
        expert_demand_file.verify(file)
    capsys.readouterr()


def test_requests_that_cannot_be_carried_out(calibrated, tmp_path, words):
    path, _ = calibrated
    short = tmp_path / "short.txt"
    short.write_text(WORDS * 3)
    with pytest.raises(CalibrationError, match="needs at least 2048"):
        calibrate(path, short)
    with pytest.raises(CalibrationError, match="is a mixture of experts"):
        calibrate(path, words, kind="low-rank")
    with pytest.raises(CalibrationError, match="seed -1"):
        calibrate(path, words, seed=-1)
    with pytest.raises(BudgetError, match="too small for this model"):
        calibrate(path, words, tokens=1024, ram="1MB")
    assert not path.with_name(path.name + ".calibrating").exists()


def test_where_the_curves_do_not_help_shares_are_equal(calibrated, tmp_path):
    path = copied(calibrated[0], tmp_path / "m")
    directory = ModelDirectory(path)
    demand = expert_demand_file.read_for(directory)
    unused = expert_demand_file.ExpertDemand(demand.rows_fingerprint, False, demand.curves)
    expert_demand_file.write(path / expert_demand_file.NAME, unused)
    assert expert_demand_file.curves_of(directory) is None


def test_the_command_line(source, words, tmp_path, capsys, monkeypatch):
    fix_memory(monkeypatch, process=100_000_000)
    path = convert(str(source), tmp_path / "flash")
    flags = ["--model", str(path)]
    assert cli.main(["calibrate", *flags, "--data", str(words), "--tokens", "1024"]) == 0
    assert "Saved demand and report" in capsys.readouterr().out
    assert cli.main(["inspect", *flags]) == 0
    assert "fewer misses than equal shares" in capsys.readouterr().out
    assert cli.main(["verify", *flags]) == 0
    assert cli.main(["calibrate", *flags, "--sparsity", "0.9"]) == 2
    convert(str(source), path, force=True)
    assert not (path / expert_demand_file.NAME).exists()
