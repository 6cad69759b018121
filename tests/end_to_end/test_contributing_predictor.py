"""The worked example of CONTRIBUTING.md: a kind of predictor is one module and one entry."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from examples.frequent_predictor import ENTRY
from support.tiny import make_checkpoint

from coreml_export.errors import ExportError
from coreml_export.program.predictors import _choice
from mlx_flash import cli, load
from mlx_flash.calibration.calibrate import calibrate
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import CalibrationError, PredictorError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors import predictor_file, registry
from mlx_flash.predictors.selection import select
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions

TOKENS = mx.array([[5, 9, 200, 17, 31]])


@pytest.fixture
def frequent(monkeypatch):
    """What an entry in registry.py does."""
    monkeypatch.setitem(registry.KINDS, ENTRY.name, ENTRY)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An OPT whose FFNs have two layers and biases, fitted with the kind while it was known."""
    path = tmp_path_factory.mktemp("frequent")
    source = make_checkpoint(path / "hf", "opt", "float32", layers=2)
    out = Path(convert(str(source), path / "flash"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.KINDS, ENTRY.name, ENTRY)
        report = calibrate(out, kind="frequent", target_recall=0.5, tokens=1024)
    return out, report


class Masked(nn.Module):
    """OPT's FFN with all but some rows left out."""

    def __init__(self, mlp, rows):
        super().__init__()
        self.mlp, self.rows = mlp, rows

    def __call__(self, x):
        return self.mlp.fc2(nn.relu(self.mlp.fc1(x)) * self.rows)


def test_it_is_fitted_and_reported(model):
    path, report = model
    assert report["settings"]["kind"] == "frequent"
    assert [layer["kind"] for layer in report["layers"]] == ["frequent", "frequent"]
    assert all(0.4 < layer["recall"] < 0.6 for layer in report["layers"])
    table = (path / "calibration.txt").read_text()
    assert "frequent predictors, recall 0.5" in table


def test_it_is_loaded_and_used(model, frequent):
    path, _ = model
    directory = ModelDirectory(path)
    rows = [layer.rows for layer in directory.rows.layers]
    found = predictor_file.read(
        path / predictor_file.NAME, directory.rows.fingerprint, rows, directory.d_model
    )
    masks = [layer.tensors["rate"] >= layer.threshold for layer in found.layers]
    paged, _ = load(path, predictor="frequent", cache_share=0.3)
    dense = load_model(directory, PagingOptions(use_flash=False))
    full = dense(TOKENS)
    for layer, mask in zip(dense.layers, masks, strict=True):
        layer.mlp = Masked(layer.mlp, mask)
    expected, logits = dense(TOKENS), paged(TOKENS)
    assert mx.allclose(logits, expected, atol=1e-4)
    assert not mx.allclose(logits, full, atol=1e-3), "all rows would have done as well"
    assert paged.flash.stats().predicted == sum(int(mask.sum()) for mask in masks)
    assert select(directory).kind == "frequent", "what was fitted is what auto takes"


def test_the_commands_know_it(model, frequent, capsys):
    path, _ = model
    run = ["--model", str(path)]
    generate = ["generate", *run, "--prompt", "the fox", "--predictor", "frequent", "-m", "3"]
    assert cli.main(generate) == 0
    assert cli.main(["inspect", *run]) == 0
    assert "frequent" in capsys.readouterr().out
    assert cli.main(["verify", *run]) == 0
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--help"])
    assert "frequent" in capsys.readouterr().out


def test_rows_in_another_order_take_it_along(model, frequent, tmp_path):
    path, _ = model
    assert cli.main(["reorder", "--model", str(path), "--out", str(tmp_path / "out")]) == 0
    before, _ = load(path, cache_share=0.3)
    after, _ = load(tmp_path / "out", predictor="frequent", cache_share=0.3)
    assert mx.allclose(before(TOKENS), after(TOKENS), atol=1e-4)


def test_what_it_cannot_do_is_said(frequent, tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32", layers=2)
    path = convert(str(source), tmp_path / "flash")
    with pytest.raises(CalibrationError, match="with silu every row fires"):
        calibrate(path, kind="frequent")
    with pytest.raises(PredictorError, match=r"has no frequent predictors.*--kind frequent"):
        load(path, predictor="frequent")
    layer = predictor_file.LayerPredictor("frequent", tensors={"rate": mx.array(np.ones(4))})
    with pytest.raises(ExportError, match="kind frequent have no Core ML program"):
        _choice(layer, None)


def test_without_its_entry_it_is_gone(model, capsys):
    path, _ = model
    assert "frequent" not in (*registry.names(), *registry.fitted())
    with pytest.raises(PredictorError, match=r"kind 'frequent'.*knows low-rank or threshold"):
        load(path)
    with pytest.raises(SystemExit):
        cli.main(["generate", "--model", str(path), "--prompt", "a", "--predictor", "frequent"])
    assert "invalid choice" in capsys.readouterr().err
