"""``mlx_flash bench``: runs in processes of their own, what is told of them, what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from support.commands import run_command
from support.platforms import fix_memory

from mlx_flash.cli import bench as bench_module
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import UsageError
from mlx_flash.performance import bench, disk_speed, trial_run
from mlx_flash.performance.budget_forecast import BudgetForecast
from mlx_flash.runtime.options import PagingOptions

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return convert(FIXTURES / "llama-relu-austen", tmp_path_factory.mktemp("bench") / "m")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(disk_speed, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(trial_run, "SEQUENCES", 1)
    # What the process that runs the tests has grown to is no part of a budget.
    fix_memory(monkeypatch, process=150_000_000)


@pytest.fixture
def run(source, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*flags, model=source):
        sizes = ("--prompt-tokens", 8, "--gen-tokens", 6, "--repeats", 1)
        return run_command(capsys, "bench", "--model", model, *sizes, *flags)

    return run


def settings(source, **other):
    given = {"model": str(source), "prompt_tokens": 8, "gen_tokens": 6, "repeats": 1}
    return bench.Settings(**given, options=PagingOptions(**{"context": 16} | other))


MEASURED = {
    "prefill": [100.0, 300.0, 200.0],
    "decode": [10.0, 20.0, 40.0],
    "tokens": 4,
    "repeats": [
        {"seconds": s, "wait_seconds": w, "bytes_read": 400, "requests": 8, "read_seconds": 0.2,
         "hits": 30, "misses": 10}
        for s, w in ((0.4, 0.1), (0.2, 0.1), (0.8, 0.4))
    ],
    "peak_footprint_bytes": 7, "direct": True, "predictor": "gate", "kept_layers": 1,
    "streamed_layers": 2, "cached_rows": 3, "prompt_chunk_tokens": 16,
}  # fmt: skip


def test_figures_are_medians_per_token():
    found = bench.figures(MEASURED)
    assert found["decode_tokens_per_second"] == {"median": 20.0, "least": 10.0, "most": 40.0}
    assert found["ms_per_token"] == pytest.approx(100)
    assert found["compute_ms"] == pytest.approx(75) and found["wait_ms"] == pytest.approx(25)
    assert found["bytes_per_token"] == 100 and found["requests_per_token"] == 2
    assert found["hit_rate"] == 0.75


def test_a_table_a_json_line_and_a_picture(run, tmp_path):
    plot, file = tmp_path / "curve.png", tmp_path / "found.json"
    code, out, err = run("--ram", "400MB,50MB", "--plot", plot, "--json", file)
    assert (code, err) == (0, "")
    found = json.loads(out.splitlines()[-1])
    assert found == json.loads(file.read_text())
    assert plot.read_bytes()[:4] == b"\x89PNG"
    good, bad = found["budgets"]
    measured = good["measured"]
    assert measured["bytes_per_token"] == 0 and measured["hit_rate"] == 1
    assert 50e6 < measured["peak_footprint_bytes"] < 400e6
    assert measured["ms_per_token"] == pytest.approx(
        measured["compute_ms"] + measured["wait_ms"], rel=0.01
    )
    assert good["predicted"]["ms_per_token"] > 0
    expected = good["predicted"]["ms_per_token"] / measured["ms_per_token"] - 1
    assert good["prediction_error"] == pytest.approx(expected)
    assert "too small for this model" in bad["error"] and "measured" not in bad
    table = out.splitlines()
    assert any("400 MB" in line and "%" in line for line in table)
    assert any("50.0 MB" in line and "too small" in line for line in table)


def test_nothing_that_works_is_a_failure(run):
    code, out, _ = run("--ram", "50MB,60MB")
    assert code == 2 and out.count("too small") == 4  # in the table, and in the JSON


def test_a_sweep_goes_from_the_least_to_everything():
    class Model:
        least, most = 300_000_000, 500_000_000

    found = bench.sweep(Model(), 2**40)
    assert len(found) == 6 and found == sorted(found)
    assert found[0] == 304_000_000 and found[-1] == 504_000_000
    assert bench.sweep(Model(), 400_000_000)[-1] == 400_000_000


def test_interrupted_the_process_is_stopped(source):
    pids = []
    popen = bench.subprocess.Popen

    def start(*args, **kwargs):
        process = popen(*args, **kwargs)
        pids.append(process.pid)
        return process

    def interrupt(_):
        raise KeyboardInterrupt

    bench.subprocess.Popen, before = start, popen
    try:
        with pytest.raises(KeyboardInterrupt):
            bench.run(settings(source), 400_000_000, interrupt)
    finally:
        bench.subprocess.Popen = before
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_interrupted_what_is_finished_is_printed(run, monkeypatch):
    finished = {"ram_bytes": 400_000_000, "measured": bench.figures(MEASURED)}
    runs = iter([finished])

    def once(*_):
        try:
            return next(runs)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(bench, "run", once)
    monkeypatch.setattr(BudgetForecast, "measure", lambda *_: None)
    code, out, err = run("--ram", "400MB,450MB,500MB")
    assert code == 130 and "interrupted; the budgets that were finished are above" in err
    assert len(json.loads(out.splitlines()[-1])["budgets"]) == 1


def test_a_process_that_dies_is_a_row(source, monkeypatch):
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    real = bench.subprocess.Popen
    monkeypatch.setattr(
        bench.subprocess, "Popen", lambda _, **how: real([sys.executable, "-c", script], **how)
    )
    row = bench.run(settings(source), 400_000_000, lambda _: None)
    assert "killed" in row["error"] and "memory" in row["error"]
    script = "import sys; sys.exit('all is lost')"
    row = bench.run(settings(source), 400_000_000, lambda _: None)
    assert "exit code 1: all is lost" in row["error"]


def test_a_budget_that_fails_in_its_own_process_is_a_row(source):
    row = bench.run(settings(source), 50_000_000, lambda _: None)
    assert row["error"].startswith("RAM budget 50.0 MB is too small") and "measured" not in row


def test_how_a_process_ended():
    assert "signal 11" in bench._how_it_ended(-signal.SIGSEGV, [])


def test_budgets():
    assert bench_module.budgets("400MB, 1GB") == [400_000_000, 1_000_000_000]
    assert bench_module.budgets("Sweep") is None
    for text in ("400MB,", ",", "", "400MB,400MB", "400MB,0.4GB"):
        with pytest.raises(UsageError):
            bench_module.budgets(text)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ram", "400MB,much"], "is not a size"),
        (["--ram", "400MB,,1GB"], "empty budget"),
        (["--ram", "sweep", "--gen-tokens", "0"], "--gen-tokens is at least 1"),
        (["--ram", "sweep", "--prompt-tokens", "-1"], "--prompt-tokens is at least 1"),
        (["--ram", "sweep", "--repeats", "0"], "--repeats is at least 1"),
        (["--ram", "sweep", "--context", "5"], "the run takes 16 tokens"),
        (["--ram", "sweep", "--gen-tokens", "100000"], "positions"),
        (["--ram", "sweep", "--plot", "/no/such/place.png"], "is no directory"),
        (["--ram", "sweep", "--json", "/no/such/place.json"], "is no directory"),
        (["--ram", "sweep", "--plot", "curve.txt"], "ends in .png"),
        (["--ram", "sweep", "--predictor", "threshold"], "has no threshold predictors"),
        ([], "--ram"),
    ],
)
def test_bad_input(run, flags, says):
    code, out, err = run(*flags)
    assert code == 2 and says in err and not out


def test_a_plot_that_cannot_be_written_is_told_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("it began"))
    file = tmp_path / "curve.png"
    file.mkdir()
    code, _, err = run("--ram", "400MB", "--plot", file)
    assert code == 2 and "is a directory" in err


def test_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("--ram", "400MB", "--plot", tmp_path / "curve.png")
    assert code == 2 and "pip install matplotlib" in err


def test_no_such_model(run, tmp_path):
    code, _, err = run("--ram", "1GB", model=tmp_path / "nowhere")
    assert code == 2 and "no such model directory" in err
