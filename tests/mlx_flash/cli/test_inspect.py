"""``inspect``: figures and text."""

import json

import mlx.core as mx

from mlx_flash.model_directory.directory import ModelDirectory

LAYERS, ROWS = 8, 160


def test_inspect(model, run, steady):
    code, out, err = run("inspect", "--json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    directory = ModelDirectory(model)
    assert info["model_type"] == "llama"
    assert info["activation"] == "silu"
    assert info["dtype"] == "F32"
    assert (info["layers"], info["rows"]) == (LAYERS, LAYERS * ROWS)
    assert info["row_bytes"] == directory.rows.layout.stride
    assert info["row_file_bytes"] == (model / "ffn_rows.safetensors").stat().st_size
    assert info["resident_bytes"] == (model / "model.safetensors").stat().st_size
    assert info["parts"] == ["gate", "up", "down"]
    assert info["context"] == 512
    assert info["least_bytes"] < info["dense_bytes"]
    kept = [row["kept_layers"] for row in info["budgets"]]
    assert kept == sorted(kept)
    assert kept[-1] == LAYERS
    assert info["budgets"][0]["ram_bytes"] >= info["least_bytes"]
    layer = ROWS * directory.rows.layout.ideal_bytes
    for row in info["budgets"]:
        assert row["kept_bytes"] == row["kept_layers"] * layer
        assert row["kept_bytes"] + row["streamed_bytes_per_token"] == LAYERS * layer
    code, out, err = run("inspect")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{model}: llama, {info['parameters'] / 1e6:.1f} M parameters, F32"
    assert f"{LAYERS} layers, {LAYERS * ROWS} rows of {info['row_bytes']} bytes" in out
    assert "gate + up + down" in out
    assert len(lines) == 6 + len(info["budgets"])


def test_inspect_counts_parameters(model, source, run):
    weights = mx.load(str(source / "model.safetensors"))
    info = json.loads(run("inspect", "--json")[1])
    assert info["parameters"] == sum(w.size for w in weights.values())


def test_inspect_context(run, steady):
    short = json.loads(run("inspect", "--json", "--context", 10)[1])
    long = json.loads(run("inspect", "--json", "--context", 500)[1])
    assert (short["context"], long["context"]) == (10, 500)
    assert short["least_bytes"] < long["least_bytes"]
    for context in (0, -1):
        code, _, err = run("inspect", "--context", context)
        assert code == 2
        assert f"--context is at least 1, got {context}" in err
