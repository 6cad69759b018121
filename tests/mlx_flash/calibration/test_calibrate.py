"""Calibrating whole models: trained ones, tiny ones of other families, faults, interruptions."""

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import utils
from support.tiny import make_checkpoint

from mlx_flash import cli
from mlx_flash.calibration import probes, recordings, report_files, text_run
from mlx_flash.calibration import text as text_module
from mlx_flash.calibration.calibrate import calibrate
from mlx_flash.calibration.neurons import low_rank_fit, report
from mlx_flash.calibration.neurons.low_rank_fitter import LowRankFitter
from mlx_flash.common.platform import current_platform
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError, CalibrationError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.registry import get_classes
from mlx_flash.predictors.predictor_file import NAME, read
from mlx_flash.runtime.load import load_model, load_tokenizer
from mlx_flash.runtime.options import PagingOptions

FIXTURES = Path(__file__).parents[2] / "fixtures"
QUICK = {"tokens": 1024, "rank": 64}
RAISED = {
    "tokens": 1024,
    "target_recall": 0.3,
    "max_loss": 0.02,
}  # recalls are raised until it holds
WORDS = "the brown fox and the other hound ran over the hill in the morning. "


def predictors_of(path):
    directory = ModelDirectory(path)
    rows = [layer.rows for layer in directory.rows.layers]
    width = directory.rows.layout.parts[0].width
    return read(path / NAME, directory.rows.fingerprint, rows, width)


def state_of(path):
    return path.with_name(path.name + ".calibrating")


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return convert(str(FIXTURES / "opt-austen"), tmp_path_factory.mktemp("opt") / "flash")


@pytest.fixture(scope="module")
def opt_report(opt):
    return calibrate(opt, **QUICK)


@pytest.fixture(scope="module")
def opt_raised(opt, tmp_path_factory):
    """Directory, report, and FFNs of opened models that were left whenever a layer was fitted."""
    model = tmp_path_factory.mktemp("raised") / "flash"
    subprocess.run(["cp", "-r", opt, model], check=True)
    alive, left = [], []
    watch, fitted = probes.watch, LowRankFitter.fit

    def watched(loaded, *args):
        alive.extend(weakref.ref(mlp) for _, mlp in loaded.flash.pager.found)
        watch(loaded, *args)

    def counted(self, *args):
        left.append(sum(ref() is not None for ref in alive))
        return fitted(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "watch", watched)
        patch.setattr(LowRankFitter, "fit", counted)
        patch.setattr(LowRankFitter, "ranks", lambda _: (16, 64))
        return model, calibrate(model, **RAISED), left


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(random.choice(WORDS.split(), 3000)))
    return file


def tiny(path, model_type="llama", **overrides):
    source = make_checkpoint(path / "hf", model_type, layers=2, **overrides)
    return convert(str(source), path / "flash")


def test_a_trained_model_meets_its_targets(opt, opt_report):
    held_out, total = opt_report["perplexity"]["held_out"], opt_report["total"]
    assert held_out["loss"] < 0.01
    assert total["recall"] >= 0.95
    assert total["predicted_per_active"] < 3
    assert total["sparsity"] > 0.9
    for layer in opt_report["layers"]:
        assert layer["recall"] >= 0.95
        assert layer["weighted_recall"] >= 0.95
        fresh = list(layer["fresh"].values())
        assert len(fresh) == 8
        assert fresh == sorted(fresh, reverse=True)
        assert 0 < layer["fresh_active"]["4"] < layer["active"]
    found = predictors_of(opt)
    assert found.kind == "low-rank"
    assert [layer.rank for layer in found.layers] == [64] * 4
    assert found.measured["perplexity_predicted"] == held_out["predicted"]
    assert found.measured["tokens"] == opt_report["text"]["train_tokens"]
    for layer, figures in zip(found.layers, opt_report["layers"], strict=True):
        assert list(layer.demand) == ["1", "2", "4", "8", "16"]
        assert layer.demand["1"] == pytest.approx(figures["predicted"])
        assert figures["predictor_bytes"] == layer.nbytes
    assert not state_of(opt).exists()


def test_the_report_is_written_for_programs_and_people(opt, opt_report):
    assert json.loads((opt / report_files.JSON).read_text()) == opt_report
    table = (opt / report_files.TABLE).read_text()
    assert f"{opt_report['perplexity']['held_out']['predicted']:.3f}" in table
    assert sum(" KB " in line for line in table.splitlines()) >= 4
    if opt_report["plot"] == report_files.PLOT:
        assert (opt / report_files.PLOT).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_rest_is_written(opt_report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report_files.write(tmp_path, dict(opt_report), report.table, report.draw)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        report_files.JSON,
        report_files.TABLE,
    ]
    assert "mlx-flash-rows[training]" in (tmp_path / report_files.TABLE).read_text()


def test_the_masked_perplexity_is_that_of_the_predictors_as_stored(opt, opt_report):
    """Computed here from the file, with the FFN written out."""
    directory = ModelDirectory(opt)
    text = text_module.load(None, load_tokenizer(directory), 1024, 256, 0)
    model = load_model(directory, PagingOptions(use_flash=False))
    for layer, found in zip(model.layers, predictors_of(opt).layers, strict=True):
        layer.mlp = Masked(layer.mlp, found)
    total = 0.0
    for tokens in mx.array(text.held_out)[:, None]:
        logits = model(tokens).astype(mx.float32)
        total += nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:], reduction="sum").item()
    perplexity = np.exp(total / text.held_out[:, 1:].size)
    assert perplexity == pytest.approx(opt_report["perplexity"]["held_out"]["predicted"], rel=2e-3)


class Masked(nn.Module):
    def __init__(self, mlp, found):
        super().__init__()
        self.mlp, self.found = mlp, found

    def __call__(self, x):
        t = self.found.tensors
        scores = (x @ t["first"].T) @ t["second"].T + t["bias"]
        h = nn.relu(self.mlp.fc1(x)) * (mx.sigmoid(scores) >= self.found.threshold)
        return self.mlp.fc2(h)


@pytest.mark.parametrize("stage", ["recording", pytest.param("fitting", marks=pytest.mark.whole)])
def test_interrupted_it_goes_on_and_ends_the_same(opt, opt_report, tmp_path, monkeypatch, stage):
    expected = (opt / NAME).read_bytes()
    model = tmp_path / "flash"
    subprocess.run(["cp", "-r", opt, model], check=True)
    for file in (NAME, report_files.JSON, report_files.TABLE):
        (model / file).unlink()

    def strike(now, done, total):
        if now == stage and 0 < done < total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, **QUICK, progress=strike)
    assert not (model / NAME).exists()
    torn = next(state_of(model).glob("layer-002.*.x.bits"))
    with open(torn, "ab") as f:
        f.write(b"torn by a kill")
    stages = []
    calibrate(model, **QUICK, progress=lambda *event: stages.append(event))
    assert (model / NAME).read_bytes() == expected
    first = {name: done for name, done, _ in reversed(stages)}
    assert first["recording"] > 0
    if stage == "fitting":
        assert first["recording"] == 2048
    assert not state_of(model).exists()


@pytest.mark.whole
def test_interrupted_in_a_second_fit_it_ends_the_same(opt, opt_raised, tmp_path, monkeypatch):
    monkeypatch.setattr(LowRankFitter, "ranks", lambda _: (16, 64))
    model = tmp_path / "flash"
    subprocess.run(["cp", "-r", opt, model], check=True)
    (model / NAME).unlink(missing_ok=True)
    checked = False

    def strike(now, done, total):
        nonlocal checked
        checked = checked or now.startswith("checking")
        if checked and now == "fitting" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, **RAISED, progress=strike)
    assert not (model / NAME).exists()
    calibrate(model, **RAISED)
    assert (model / NAME).read_bytes() == (opt_raised[0] / NAME).read_bytes()


@pytest.mark.whole
def test_a_model_is_gone_while_layers_are_fitted_again(opt_raised):
    """Else the budget would hold the model and what fitting takes."""
    left = opt_raised[2]
    assert len(left) > 4
    assert not any(left)


def test_other_settings_or_a_lost_file_begin_anew(opt, tmp_path):
    path = tmp_path / "model.calibrating"
    with recordings.working_directory(path, "one"):
        recordings.save_layer(path, "000-0.95", {"a": 1}, {"b": np.ones(2)})
    with recordings.working_directory(path, "one"):
        assert recordings.load_layer(path, "000-0.95")[0] == {"a": 1}
    with recordings.working_directory(path, "two"):
        assert recordings.load_layer(path, "000-0.95") is None
    assert not path.exists()  # nothing was done


def test_a_working_directory_is_taken_once_and_never_from_others(tmp_path):
    path = tmp_path / "model.calibrating"
    with (
        recordings.working_directory(path, "one"),
        pytest.raises(CalibrationError, match="another calibration"),
    ):
        recordings.working_directory(path, "one").__enter__()
    path.mkdir()
    (path / "mine.txt").write_text("keep")
    with pytest.raises(CalibrationError, match="in the way and not made by mlx_flash"):
        recordings.working_directory(path, "one").__enter__()
    assert (path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_recall": 0.0}, "recall of 0.0; expected one between 0 and 1"),
        ({"target_recall": 1.0}, "recall of 1.0"),
        ({"target_recall": float("nan")}, "recall of nan"),
        ({"kind": "threshold", "sparsity": 1.5}, "sparsity of 1.5; expected one between 0 and 1"),
        ({"kind": "threshold", "sparsity": 0}, "sparsity of 0"),
        ({"rank": 0}, "rank 0; expected auto or 1 to 128"),
        ({"rank": 129}, "rank 129"),
        ({"rank": "much"}, "rank 'much'"),
        ({"kind": "exact"}, "kind 'exact'; expected low-rank or threshold"),
        ({"nonlinearity": "gelu"}, "nonlinearity 'gelu'; expected none or relu"),
        ({"tokens": 100}, "100 tokens to train on; expected at least 1024"),
        ({"seed": -1}, "seed -1"),
        ({"max_loss": -0.1}, "loss of -0.1"),
    ],
)
def test_settings_out_of_range(opt, given, message):
    with pytest.raises(CalibrationError, match=message):
        calibrate(opt, **given)
    assert not state_of(opt).exists()


def test_no_low_rank_predictor_where_nothing_is_zero(tmp_path, words):
    model = tiny(tmp_path)
    with pytest.raises(CalibrationError, match=r"silu, has no zeros.*--kind threshold"):
        calibrate(model, words, kind="low-rank")
    model = tiny(tmp_path / "xielu", "apertus")
    with pytest.raises(CalibrationError, match=r"no threshold can be set.*xielu"):
        calibrate(model, words)


def test_what_is_no_number_stops_it_and_leaves_the_old_predictors(opt, opt_report, monkeypatch):
    before = {file: file.read_bytes() for file in opt.iterdir()}
    steps = []

    def broken(xp, values, *rest):
        steps.append(1)
        loss, grads = right(xp, values, *rest)
        return (np.nan if len(steps) > 10 else loss), grads

    right = low_rank_fit.gradients
    monkeypatch.setattr(low_rank_fit, "gradients", broken)
    with pytest.raises(CalibrationError, match=r"layer 1 at rank 16 .*loss is nan.*nothing was"):
        calibrate(opt, tokens=1024, rank=16)
    assert {file: file.read_bytes() for file in opt.iterdir()} == before
    recordings.remove(state_of(opt))


def test_weights_that_overflow_are_named(tmp_path, words):
    source = make_checkpoint(tmp_path / "hf", "opt", "float16", layers=3)
    weights = mx.load(str(source / "model.safetensors"))
    name = next(n for n in weights if n.endswith("layers.1.fc1.weight"))
    weights[name] = weights[name] * 60000
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "pt"})
    model = convert(str(source), tmp_path / "flash")
    with pytest.raises(CalibrationError, match="layer 1 gives infinities or NaN"):
        calibrate(model, words, tokens=1024)
    assert not (model / NAME).exists()


def test_too_little_disk_is_said_before(opt, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(CalibrationError, match=r"not enough disk .*, 1\.0 MB free.*--tokens"):
        calibrate(opt, **QUICK)


def test_a_disk_that_fills_up_is_named(opt, opt_report):
    expected = (opt / NAME).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(CalibrationError, match=f"{os.strerror(errno.EFBIG)}; run the same"):
            calibrate(opt, **QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state_of(opt).is_dir()
    assert (opt / NAME).read_bytes() == expected
    recordings.remove(state_of(opt))


def test_a_directory_that_cannot_be_written(opt, monkeypatch):
    monkeypatch.setattr(text_run.os, "access", lambda *_: False)
    with pytest.raises(CalibrationError, match="no permission to write in"):
        calibrate(opt)


def test_a_budget_is_kept_and_streaming_gives_the_same(opt, opt_report, tmp_path):
    with pytest.raises(BudgetError, match=r"calibration takes .* of the RAM budget.*too small"):
        calibrate(opt, **QUICK, ram="60MB")
    assert not state_of(opt).exists()
    model = tmp_path / "flash"
    subprocess.run(["cp", "-r", opt, model], check=True)
    (model / NAME).unlink()
    calls = []

    def streamed(directory, options):
        calls.append(options)
        return load_model(directory, options.replace(kept_share=0.5))

    ram = current_platform().process_bytes() + 300 * 10**6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_run, "load_model", streamed)
        found = calibrate(model, **QUICK, ram=ram)
    assert [options.predictor for options in calls] == ["none", "none"]
    assert calls[1].ram < calls[0].ram <= ram - probes.logits_bytes(ModelDirectory(opt))
    assert found["perplexity"]["held_out"]["dense"] == pytest.approx(
        opt_report["perplexity"]["held_out"]["dense"], rel=2e-3
    )


# Fused gate and up; a norm inside the FFN; the stack run twice; ungated, gelu, with biases.
FAMILIES = ["phi3", "lille-130m", "nanbeige", "gpt2"]


@pytest.mark.parametrize(
    "family", [FAMILIES[0], *(pytest.param(f, marks=pytest.mark.whole) for f in FAMILIES[1:])]
)
def test_thresholds_for_any_family(tmp_path, words, family):
    model = tiny(tmp_path, family)
    found = calibrate(model, words, sparsity=0.4, tokens=1024)
    stored = predictors_of(model)
    assert stored.kind == "threshold"
    assert found["total"]["predicted"] / found["total"]["rows"] == pytest.approx(0.6, abs=0.01)
    assert found["perplexity"]["held_out"]["predicted"] != found["perplexity"]["held_out"]["dense"]
    assert found["perplexity"]["held_out"]["loss"] < 0.2
    assert found["perplexity"]["held_out"]["dense"] == pytest.approx(
        plain_perplexity(tmp_path / "hf", model, words), rel=1e-4
    )
    assert {"activation", "product"} <= found["perplexity"]["other_scores"].keys()
    assert all(layer.tensors["scale"].shape == (f["rows"],) for layer, f in
               zip(stored.layers, found["layers"], strict=True))  # fmt: skip


def test_a_threshold_below_the_zeros_loses_nothing(tmp_path, words):
    model = tiny(tmp_path, "opt")
    found = calibrate(model, words, kind="threshold", sparsity=0.2, tokens=1024)
    assert found["perplexity"]["held_out"]["loss"] == 0.0
    assert [layer.threshold for layer in predictors_of(model).layers] == [0.0, 0.0]
    loaded = load_model(
        ModelDirectory(model), PagingOptions(predictor="threshold", cache_share=0.9)
    )
    dense = load_model(ModelDirectory(model), PagingOptions(use_flash=False))
    tokens = mx.array([[5, 9, 200]])
    assert mx.allclose(loaded(tokens), dense(tokens), atol=1e-4)


def plain_perplexity(source, model, words):
    """By mlx-lm's own model of the checkpoint, nothing of this package."""
    dense, _ = utils.load_model(source, get_model_classes=get_classes)
    tokenizer = load_tokenizer(ModelDirectory(model))
    held_out = text_module.load(words, tokenizer, 1024, 512, 0).held_out
    total = 0.0
    for tokens in mx.array(held_out)[:, None]:
        logits = dense(tokens).astype(mx.float32)
        total += nn.losses.cross_entropy(logits[:, :-1], tokens[:, 1:], reduction="sum").item()
    return np.exp(total / held_out[:, 1:].size)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("opt", {"enable_bias": False}),
        ("nemotron", {}),
        ("llama", {"hidden_act": "relu", "mlp_bias": True}),
    ],
)
def test_low_rank_for_other_relus(tmp_path, words, family, overrides):
    model = tiny(tmp_path, family, **overrides)
    found = calibrate(model, words, rank=48, tokens=1024, nonlinearity="relu")
    assert all(layer["recall"] >= 0.95 for layer in found["layers"] if layer["kind"] != "none")
    assert found["perplexity"]["held_out"]["loss"] < 0.05
    assert predictors_of(model).layers[0].nonlinearity == "relu"


def test_a_predictor_that_names_most_rows_is_left_out(tmp_path, words):
    """Random weights fire for half of all inputs: no rank 1 predictor is worth its bytes."""
    model = tiny(tmp_path, "opt")
    found = calibrate(model, words, rank=1, tokens=1024)
    assert [layer.kind for layer in predictors_of(model).layers] == ["none", "none"]
    assert found["perplexity"]["held_out"]["loss"] == 0.0
    assert found["total"]["predicted"] == found["total"]["rows"]
    assert "whole" in (model / report_files.TABLE).read_text()


@pytest.mark.whole
def test_recalls_are_raised_until_the_perplexity_holds(opt_raised):
    found = opt_raised[1]
    losses = [tried["loss"] for tried in found["rounds"]]
    targets = [np.mean(tried["targets"]) for tried in found["rounds"]]
    assert len(losses) > 1
    assert losses[0] > 0.02
    assert losses[-1] < losses[0]
    assert targets == sorted(targets)
    assert found["total"]["recall"] > 0.3 + 0.1


@pytest.mark.whole
def test_layers_whose_recall_is_raised_are_fitted_for_it(opt_raised):
    """What is cheapest at a recall of 0.3 may name most of the rows at a higher one."""
    found = opt_raised[1]
    targets = found["rounds"][-1]["targets"]
    assert max(targets) > 0.3
    for layer, target in zip(found["layers"], targets, strict=True):
        assert min(one["recall"] for one in layer["candidates"]) >= target - 1e-3
        best = min(layer["candidates"], key=lambda one: one["cost"])
        assert best["rank"] == layer["rank"]
        assert best["bytes_per_token"] == layer["bytes_per_token"]


def test_rank_is_chosen_by_cost(opt, opt_report, tmp_path):
    model = tmp_path / "flash"
    subprocess.run(["cp", "-r", opt, model], check=True)
    found = calibrate(model, tokens=1024)
    for layer in found["layers"]:
        tried = layer["candidates"]
        assert {one["rank"] for one in tried} == {8, 16, 32, 64}
        best = min(tried, key=lambda one: one["cost"])
        assert (best["rank"], best["cost"]) == (layer["rank"], layer["cost"])
        for one in tried:
            memory = one["predictor_bytes"] + one["cache_bytes"]
            assert one["cost"] == pytest.approx(one["bytes_per_token"] + memory / 8)


def test_watching_changes_nothing(tmp_path):
    model = tiny(tmp_path, "llama", dtype="float32")
    tokens = mx.array([[5, 9, 200, 17, 31]])
    directory = ModelDirectory(model)
    expected = load_model(directory, PagingOptions(use_flash=False))(tokens)
    for share in (0.0, 1.0):
        loaded = load_model(directory, PagingOptions(kept_share=share))
        seen = []
        probes.watch(loaded, directory.ffn, lambda s, seen=seen: seen.append(s) or s.h)
        assert (loaded(tokens) == expected).all()
        assert [s.layer for s in seen] == [0, 1]
        for s in seen:
            assert mx.allclose(nn.silu(s.gate) * s.up, s.h, atol=1e-6)


def test_what_was_fitted_can_be_run_with(opt, opt_report):
    """Paged at one token's time, the held-out text comes out about as well as when masked."""
    directory = ModelDirectory(opt)
    model = load_model(directory, PagingOptions(predictor="low-rank", cache_share=0.25))
    tokenizer = load_tokenizer(directory)
    text = text_module.load(None, tokenizer, QUICK["tokens"], 256, 0)
    paged = probes.perplexity(model, text.held_out[:1], 1)
    dense = load_model(directory, PagingOptions(use_flash=False))
    assert paged == pytest.approx(probes.perplexity(dense, text.held_out[:1], 256), rel=0.015)
    assert model.flash.stats().predicted > 0


def test_command_line(tmp_path, words, capsys):
    model = tiny(tmp_path, "opt")
    args = ["calibrate", "--model", str(model), "--data", str(words), "--tokens", "1024"]
    assert cli.main([*args, "--rank", "48", "--target-recall", "0.9"]) == 0
    out = capsys.readouterr().out
    assert out.startswith((model / report_files.TABLE).read_text())
    assert [layer.rank for layer in predictors_of(model).layers] == [48, 48]
    assert cli.main(["verify", "--model", str(model)]) == 0
    assert cli.main([*args, "--sparsity", "2"]) == 2
    assert "sparsity of 2.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["calibrate", "--model", str(model), "--rank", "high"])
    assert "neither auto nor a whole number" in capsys.readouterr().err


def test_locks_are_let_go(tmp_path):
    path = tmp_path / "model.calibrating"
    with pytest.raises(KeyboardInterrupt), recordings.working_directory(path, "one"):
        (path / "state").write_text("")
        raise KeyboardInterrupt
    lock = os.open(path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)
