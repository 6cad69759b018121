"""The command line on models whose rows are predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import run_command
from support.platforms import fix_memory

from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors

FIXTURES = Path(__file__).parents[2] / "fixtures"
PROMPT = "She had been some minutes in the room"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return convert(FIXTURES / "llama-relu-austen", tmp_path_factory.mktemp("cli") / "m")


@pytest.fixture
def run(source, capsys, monkeypatch):
    """Run a command in this process: (exit code, stdout, stderr)."""
    fix_memory(monkeypatch, process=100_000_000, machine=2_000_000_000)

    return lambda command, *flags: run_command(capsys, command, "--model", source, *flags)


@pytest.fixture
def generate(run, tmp_path):
    def generate(*flags, tokens=24):
        stats = tmp_path / "stats.json"
        flags = ("--max-tokens", tokens, "--stats", stats, *flags)
        code, out, err = run("generate", "--prompt", PROMPT, *flags)
        assert (code, err) == (0, "")
        return json.loads(stats.read_text()), out

    return generate


@pytest.fixture
def tight(run):
    """A budget under which only some of the rows are cached."""
    info = json.loads(run("inspect", "--json", "--context", 40)[1])
    assert info["predictor"]["kind"] == "gate" and info["predictor"]["exact"]
    return info["dense_bytes"] - 2_100_000  # which has up to 2 MB of margin


def test_generate_reads_the_rows_that_fire(generate, tight):
    dense, _ = generate("--dense")
    stats, out = generate("--ram", tight)
    assert stats["tokens"] == dense["tokens"]
    flash = stats["flash"]
    assert (flash["predictor"], flash["exact"], flash["streamed_layers"]) == ("gate", True, 0)
    assert flash["forwards"] == 23 and flash["layer_calls"] == 23 * len(flash["rows"])
    assert 0 < flash["predicted"] < 0.3 * 23 * sum(flash["rows"])
    assert flash["hits"] + flash["misses"] == flash["predicted"]
    assert 0 < flash["cached_rows"] < sum(flash["rows"])
    assert sum(flash["planned_bytes"].values()) <= tight
    assert "Predictor: gate, " in out and "; exact" in out


@pytest.mark.parametrize("flags", [("--policy", "lru"), ("--policy", "lfu"), ("--window", 2)])
def test_policies(generate, tight, flags):
    if flags[0] == "--window":
        flags = ("--policy", "window", *flags)
    expected, _ = generate("--dense")
    assert generate("--ram", tight, *flags)[0]["tokens"] == expected["tokens"]


def test_no_predictor(generate, tight):
    stats, out = generate("--ram", tight, "--predictor", "none")
    assert stats["flash"]["predictor"] == "none" and stats["flash"]["predicted"] == 0
    assert stats["flash"]["streamed_layers"] > 0
    assert "Predictor:" not in out


def test_a_lossy_predictor_says_so(source, generate, run, tight):
    directory = ModelDirectory(source)
    layers = [LayerPredictor("threshold", 0.05) for _ in directory.rows.layers]
    measured = {"perplexity_dense": 10.0, "perplexity_predicted": 10.5}
    path = source / predictor_file.NAME
    predictors = Predictors("threshold", directory.rows.fingerprint, layers, measured)
    predictor_file.write(path, predictors)
    try:
        stats, out = generate("--ram", tight)
        assert stats["flash"]["predictor"] == "threshold" and not stats["flash"]["exact"]
        assert stats["flash"]["measured"] == measured
        assert "lossy, perplexity 10.50 against 10.00 (+5.0 %) when calibrated" in out
        assert "lossy: perplexity 10.50, dense 10.00" in run("inspect")[1]
        assert run("verify")[0] == 0
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data[:-1])
        code, _, err = run("generate", "--prompt", PROMPT, "--ram", tight)
        assert code == 1 and "calibrate again" in err
        code, _, err = run("verify")
        assert code == 1 and "calibrate again" in err
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--predictor", "up"), "has a gate, its exact predictor is 'gate'"),
        (("--predictor", "low-rank"), "train them with: mlx_flash calibrate --model"),
        (("--predictor", "threshold"), "--kind threshold --sparsity 0.5"),
        (("--predictor", "oracle"), "invalid choice: 'oracle'"),
        (("--policy", "fifo"), "invalid choice: 'fifo'"),
        (("--policy", "window", "--window", 0), "--window is at least 1 token, got 0"),
        (("--policy", "lru", "--window", 4), "--window needs --policy window"),
        (("--dense", "--predictor", "gate"), "--dense reads nothing"),
        (("--predictor", "gate", "--ram", "130MB"), "least that works is"),
    ],
)
def test_bad_arguments(run, flags, message):
    code, out, err = run("generate", "--prompt", PROMPT, *flags)
    assert (code, out) == (2, "")
    assert message in err
