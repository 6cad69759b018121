"""A Mac's rules: its memory figures, F_NOCACHE, no O_DIRECT, no asynchronous reads."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import mlx.core as mx
import pytest
from support.platforms import MAC_LIBRARIES
from support.tiny import make_checkpoint

from mlx_flash import cli, load
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.performance import disk_speed, trial_run
from mlx_flash.runtime.memory_plan import way_budgets
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

FIXTURES = Path(__file__).parents[1] / "fixtures"
WIDE = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Sixteen layers of 3 MB, so that budgets have something to choose from."""
    path = tmp_path_factory.mktemp("wide")
    source = make_checkpoint(path / "hf", "llama", "bfloat16", layers=16, **WIDE)
    return convert(str(source), path / "flash")


@pytest.fixture(scope="module")
def relu(tmp_path_factory):
    return convert(FIXTURES / "llama-relu-austen", tmp_path_factory.mktemp("relu") / "m")


@pytest.fixture(autouse=True)
def mac(darwin, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    gc.collect()
    mx.clear_cache()
    return darwin


def test_what_was_loaded_before_does_not_count(wide, mac):
    """A budget gives the same plan however often a model was loaded and closed in the process."""
    directory = ModelDirectory(wide)
    reader = RowReader(directory.rows)
    needs = memory_requirements(directory, reader, PagingOptions(context=64))
    reader.close()
    assert reader.engine == "threads" and reader.direct
    assert needs.process < MAC_LIBRARIES + 10**6
    least = way_budgets(needs)["streamed"]
    plans, tokens = [], []
    for ram in [least + (needs.dense - least) // 2] * 3 + [least]:
        model, _ = load(wide, ram=ram, context=64)
        plans.append(model.flash.plan)
        tokens.append(mx.argmax(model(mx.array([[5, 6, 7]]))[0], axis=-1).tolist())
        model.flash.close()
        del model
        gc.collect()
        mx.clear_cache()
    assert 0 < len(plans[0].kept) < 16
    first = plans[0]
    same = (first.kept, first.streamed, first.step, first.total)
    assert {(plan.kept, plan.streamed, plan.step, plan.total) for plan in plans[:3]} == {same}
    assert plans[3].kept == ()
    assert tokens == [tokens[0]] * 4
    assert mac.peak_process_bytes() > mac.process_bytes()


def test_calibrate_within_a_budget(relu, mac, capsys):
    """Rounds of recording, fitting and checking, each beginning where the last left memory."""
    load(relu, context=64)[0].flash.close()  # what came before has its part in the peak
    held = mx.zeros((100_000_000,), mx.float32)
    mx.eval(held)
    del held
    gc.collect()
    mx.clear_cache()
    assert mac.peak_process_bytes() > MAC_LIBRARIES + 400_000_000
    command = ["calibrate", "--model", str(relu), "--tokens", "1024", "--target-recall", "0.8"]
    assert cli.main([*command, "--ram", "350MB"]) == 0, capsys.readouterr().err
    found = json.loads((relu / "calibration.json").read_text())
    assert found["perplexity"]["held_out"]["predicted"] > 1


def test_plan(relu, mac, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(disk_speed, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(trial_run, "SEQUENCES", 1)
    printed = []
    for _ in range(2):
        assert cli.main(["plan", "--model", str(relu), "--ram", "300MB"]) == 0
        printed.append(capsys.readouterr().out)
    assert "100.0 MB  interpreter, libraries" in printed[0]
    assert printed[0] == printed[1]  # from what the first has measured, and as much memory
    kept = tmp_path / "Library" / "Caches" / "mlx_flash"
    facts = [entry["facts"] for entry in json.loads((kept / "speeds.json").read_text()).values()]
    assert len(facts) == 1
    assert facts[0]["machine"].startswith("Apple M2 Pro, Mac14,9, ")
    assert (facts[0]["engine"], facts[0]["direct"]) == ("threads", True)


def test_speeds_are_of_one_machine(relu, mac, monkeypatch):
    """A home that moves to another Mac does not take the old one's speeds with it."""
    reader = RowReader(ModelDirectory(relu).rows)
    measured = []

    def measure(*_):
        measured.append(mac.machine_name())
        return disk_speed.DiskSpeed((1,), (0.1,), (4096.0,), (1.0,), 1e9, "today")

    monkeypatch.setattr(disk_speed, "measure_disk", measure)
    models = (b"Mac14,9\0", b"Mac16,1\0", b"Mac14,9\0")
    for model in models:
        mac._library.values["hw.model"] = model
        disk_speed.disk_speed(reader)
    reader.close()
    assert len(measured) == 2
    assert ["Mac14,9" in measured[0], "Mac16,1" in measured[1]] == [True, True]
