"""``mlx_flash plan``: figures, what they are made of, and the cache of measurements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.commands import run_command
from support.platforms import FakeDarwin, fix_memory

from mlx_flash.common.platform import Linux
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging.policies import POLICIES, make_policy
from mlx_flash.paging.simulate import miss_counts
from mlx_flash.performance import disk_speed, trial_run
from mlx_flash.performance.budget_forecast import BudgetForecast
from mlx_flash.performance.disk_speed import DiskSpeed
from mlx_flash.performance.forecast import Layers, Timing, TrialRun, forecast
from mlx_flash.performance.row_trace import RowUse
from mlx_flash.performance.teacher_forcing import book, walk
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.memory_plan import Plan
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

FIXTURES = Path(__file__).parents[2] / "fixtures"
DISK = DiskSpeed(
    (1, 10, 100), (0.001, 0.002, 0.01), (4e3, 4e4, 4e5), (1.0, 10.0, 50.0), 1e9, "today"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return convert(FIXTURES / "llama-relu-austen", tmp_path_factory.mktemp("plan") / "m")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_speed, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(trial_run, "SEQUENCES", 1)
    fix_memory(monkeypatch, process=100_000_000, machine=2_000_000_000)
    return tmp_path / "cache" / "mlx_flash"


@pytest.fixture
def run(source, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*flags, model=source):
        return run_command(capsys, "plan", "--model", model, *flags)

    return run


@pytest.fixture
def tight(source):
    """A budget under which rows are read as they fire."""
    return BudgetForecast(ModelDirectory(source), PagingOptions(context=130)).needs.dense - 500_000


def streamed(**other):
    return Timing(**{"ram": 1, "tokens": 8, "compute": 0.1, "nbytes": 1e8, "requests": 50} | other)


def test_streaming_is_the_longer_of_reading_and_computing_where_the_trial_hid_the_other():
    trial = TrialRun({"streamed": streamed(wait=0.0, read=0.1, rate=1.0)})
    layers = Layers((8,) * 4, (10**8,) * 4)
    found = forecast(Plan(None, (), (0, 1, 2, 3), 1, {}), layers, DISK, trial, "lfu")
    assert found.read == pytest.approx(0.4) and found.compute == pytest.approx(0.1)
    assert found.seconds == pytest.approx(0.4) and found.nbytes == 4e8
    assert found.requests == pytest.approx(200) and found.hit_rate == 0
    kept = forecast(Plan(None, (0, 2, 3), (1,), 1, {}), layers, DISK, trial, "lfu")
    assert kept.seconds == pytest.approx(0.1) and kept.hit_rate == pytest.approx(0.75)


def test_what_the_trial_did_not_hide_is_added():
    trial = TrialRun({"streamed": streamed(wait=0.08, read=0.1, rate=0.5)})
    layers = Layers((8, 8), (10**8,) * 2)
    plan = Plan(None, (), (0, 1), 1, {})
    found = forecast(plan, layers, DISK, trial, "lfu")
    assert found.read == pytest.approx(0.1)  # half of what the disk alone would take
    assert found.seconds == pytest.approx(0.1 + 0.1 - 0.2 * 0.1)
    trial = TrialRun({"streamed": streamed(wait=0.0, read=0.1, rate=0.5)})
    assert forecast(plan, layers, DISK, trial, "lfu").seconds == pytest.approx(0.1)


def test_resident_layers_take_what_resident_layers_took():
    ways = {"streamed": streamed(compute=0.2), "resident": streamed(compute=0.1, nbytes=0)}
    layers = Layers((8,) * 4, (1,) * 4)
    half = forecast(Plan(None, (0, 1), (2, 3), 1, {}), layers, DISK, TrialRun(ways), "lfu")
    assert half.compute == pytest.approx(0.15)
    all_kept = Plan(None, (0, 1, 2, 3), (), 1, {})
    assert forecast(all_kept, layers, DISK, TrialRun(ways), "lfu").seconds == 0.1


def test_paging_counts_what_the_slots_lack():
    active = np.zeros((40, 20), bool)
    active[::2, :10] = active[1::2, 10:] = True  # ten rows, then the other ten, and so on
    paged = Timing(1, 8, compute=0.05, wait=0.002, read=0.002, requests=10, per_request=0.001)
    trial = TrialRun({"paged": paged}, RowUse((20,), (active,)))
    layers = Layers((20,), (80,))

    def at(slots):
        return forecast(Plan(None, (), (), 1, {}, {0: slots}), layers, DISK, trial, "lru")

    small, large = at(10), at(19)
    assert small.missing == 10 and small.read == pytest.approx(0.002) and small.hit_rate == 0
    assert small.seconds == pytest.approx(0.05 + 0.002)
    # One request fewer is a millisecond of computing less.
    assert large.missing < 10
    assert large.compute == pytest.approx(0.05 - 0.001 * (10 - large.requests))
    curves = [[10.0] * 10 + [4.0] * 11]
    known = forecast(Plan(None, (), (), 1, {}, {0: 10}), layers, DISK, trial, "lru", curves=curves)
    assert known.missing == 4


def test_a_longer_warm_up_finds_more_in_slots():
    active = np.eye(32, dtype=bool)[np.arange(64) % 32]
    trial = TrialRun({"paged": Timing(1, 8, compute=0.05)}, RowUse((32,), (active,)))
    plan = Plan(None, (), (), 1, {}, {0: 32})
    layers = Layers((32,), (32,))
    cold = forecast(plan, layers, DISK, trial, "lfu", warm=0, count=32)
    warm = forecast(plan, layers, DISK, trial, "lfu", warm=32, count=32)
    assert cold.missing == 1 and warm.missing == 0


def test_disk_figures_between_and_beyond_what_was_measured():
    assert DISK.time(0) == 0 and DISK.time(0.5) == 0.001
    assert DISK.time(10) == 0.002 and DISK.time(55) == pytest.approx(0.006)
    assert DISK.time(1000) == pytest.approx(0.1) and DISK.bytes_for(1000) == pytest.approx(4e6)


def test_what_is_planned_is_what_is_loaded(source, run, tight):
    code, out, err = run("--ram", tight, "--context", 130, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    model = load_model(ModelDirectory(source), PagingOptions(ram=tight, context=130))
    try:
        assert found["planned_bytes"] == model.flash.plan.to_json()
        assert found["slots"] == {str(i): n for i, n in model.flash.plan.slots.items()}
        assert found["slots"]
    finally:
        model.flash.close()
    assert sum(found["planned_bytes"].values()) <= tight
    given = found["budgets"]["given"]["forecast"]
    total = given["read_ms"] + given["compute_ms"] - given["overlapped_ms"]
    assert given["ms_per_token"] == pytest.approx(total) and 0 < given["hit_rate"] <= 1
    # The least is twice what half of this is: said, not an error.
    assert "least that works" in found["budgets"]["half"]["reason"]
    assert found["budgets"]["twice"]["forecast"]["bytes_per_token"] == 0
    assert found["measured"]["model"]["rows_recorded_on_tokens"] >= 128


def test_measured_once_and_again_when_asked(run, tight, cache, monkeypatch):
    code, text, _ = run("--ram", tight)
    assert code == 0 and "gate" not in text.splitlines()[0]
    for words in ("resident weights", "reading", "computing", "half", "twice", "Assumed"):
        assert words in text
    assert {file.suffix for file in cache.iterdir()} == {".json", ".npz"}

    def fail(*_, **__):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(disk_speed, "measure_disk", fail)
        patch.setattr("mlx_flash.performance.trial_run._Trial", fail)
        assert run("--ram", tight) == (0, text, "")
        with pytest.raises(AssertionError, match="measured again"):
            run("--ram", tight, "--remeasure")
    for file in cache.iterdir():
        file.write_text("no longer what it was")
    assert run("--ram", tight)[0] == 0


def test_measured_anew_under_a_small_budget_the_others_stay(source, monkeypatch):
    """What larger budgets had measured is not thrown away."""
    model = BudgetForecast(ModelDirectory(source), PagingOptions(context=130)).model

    class Fake:
        use = RowUse((2,), (np.ones((4, 2), bool),))

        def __init__(self, _model, ram, *_):
            self.ram = ram

        def run(self, _way):
            return Timing(self.ram, 8, compute=1.0)

    monkeypatch.setattr(trial_run, "_Trial", Fake)
    budgets = trial_run.way_budgets(model.needs)
    everything, least = max(budgets.values()), min(budgets.values())
    assert set(trial_run.run_trial(model, everything, DISK).ways) == set(budgets)
    found = trial_run.run_trial(model, least, DISK, again=True)
    assert found.use is not None
    assert {way: timing.ram for way, timing in found.ways.items()} == {
        way: least if needed == least else everything for way, needed in budgets.items()
    }
    assert trial_run.run_trial(model, least, DISK).ways == found.ways


def test_a_cache_that_cannot_be_written_is_no_error(run, tight, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run("--ram", tight)[0] == 0


@pytest.mark.parametrize("name", ["linux", "darwin"])
def test_where_the_cache_is(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")  # to be ignored, says the standard
    below = {"linux": ".cache/mlx_flash", "darwin": "Library/Caches/mlx_flash"}
    system = {"linux": Linux(), "darwin": FakeDarwin()}[name]
    assert system.cache_folder() == tmp_path / below[name]


def test_misses_are_those_of_the_running_model(source):
    """The simulation, fed with what a model was asked for, against the model's own counter."""
    forecasts = BudgetForecast(ModelDirectory(source), PagingOptions(context=130))
    forecasts.measure(400_000_000)
    use = forecasts.trial.use
    tokens = book(forecasts.tokenizer, trial_run.SEQUENCE, trial_run.START)
    for policy in POLICIES:
        model = load_model(
            forecasts.directory,
            PagingOptions(context=300, predictor="gate", policy=policy, cache_share=0.1),
        )
        try:
            read = walk(model, tokens[:64], tokens[64:80]).spent().misses
        finally:
            model.flash.close()
        expected = 0
        for layer, slots in model.flash.plan.slots.items():
            # The loop reads the prompt but for its last token at once.
            steps = use.prompt(layer, range(63), 2048, False) + use.steps(layer, range(63, 81))
            rule = make_policy(policy, use.rows[layer])
            expected += miss_counts(steps, use.rows[layer], slots, rule)[-16:].sum()
        assert read == pytest.approx(expected, rel=0.05) and read > 0


def test_a_trace_survives_being_kept():
    random = np.random.default_rng(0)
    use = RowUse((9, 20), (random.random((5, 9)) < 0.5, random.random((5, 20)) < 0.5))
    again = RowUse.from_bytes(use.to_bytes())
    assert again.rows == use.rows
    assert all((a == b).all() for a, b in zip(again.active, use.active, strict=True))
    with pytest.raises(ValueError, match="no trace"):
        RowUse.from_bytes(b"something else")


def test_disk_is_measured_with_every_number_of_rows(source):
    reader = RowReader(ModelDirectory(source).rows)
    try:
        found = disk_speed.measure_disk(reader)
    finally:
        reader.close()
    rows = reader.file.layers[0].rows
    assert found.rows[0] == 1 and found.rows[-1] == rows
    assert min(found.seconds) > 0 and found.sequential > 0
    stride = reader.file.layers[0].layout.stride
    assert found.nbytes[-1] == pytest.approx(rows * stride, rel=0.1)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ram", "much"], "is not a size"),
        (["--ram", "0"], "more than 0"),
        (["--ram", "101MB"], "the least that works"),
        (["--ram", "9GB"], "larger than the machine's memory"),
        (["--ram", "400MB", "--context", "0"], "--context is at least 1"),
        (["--ram", "400MB", "--window", "3"], "--window needs --policy window"),
        (["--ram", "400MB", "--predictor", "low-rank"], "has no low-rank predictors"),
        (["--ram", "400MB", "--predictor", "up"], "its exact predictor is 'gate'"),
        ([], "--ram"),
    ],
)
def test_bad_input(run, flags, says):
    code, out, err = run(*flags)
    assert code == 2 and says in err and not out


def test_no_such_model(run, tmp_path):
    code, _, err = run("--ram", "1GB", model=tmp_path / "nowhere")
    assert code == 2 and "no such model directory" in err
