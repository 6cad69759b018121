"""Sizes that files do not bear out, JSON without bounds, tensors where they should not lie."""

import json
import os
import shutil
import time

import pytest
from support.checkpoints import edit_config
from support.commands import run_command

from mlx_flash.common.platform import current_platform
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import DamagedError, FlashError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory

DEEP = "[" * 100_000 + "]" * 100_000
DEEPER = '{"a":' * 500 + "1" + "}" * 500
LONG = '{"a": 1' + "0" * 5000 + "}"
WIDE = "[" + "[]," * 5_000_000 + "[]]"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 300_000),
        ("num_hidden_layers", 4000),
        ("num_hidden_layers", 10**30),
        ("vocab_size", 10**9),
        ("hidden_size", 10**9),
        ("hidden_size", 2**40),
        ("intermediate_size", 10**9),
        ("num_attention_heads", 10**8),
        ("num_key_value_heads", 10**8),
        ("head_dim", 10**8),
    ],
)
def test_sizes_are_held_against_the_files(source, model, tmp_path, key, value):
    """Soon and in little memory, whether a model is converted or loaded."""
    start, before = time.process_time(), current_platform().peak_process_bytes()
    for path in (source, model):
        edit_config(path, **{key: value})
    with pytest.raises(ModelError, match=f"{key} in config.json is"):
        convert(source, tmp_path / "out")
    with pytest.raises(ModelError, match=f"{key} in config.json"):
        ModelDirectory(model)
    assert time.process_time() - start < 5
    assert current_platform().peak_process_bytes() - before < 200e6


@pytest.mark.parametrize("text", [DEEP, DEEPER, WIDE, "[1", "\ufeff{}", "NaN", LONG])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_without_bounds(source, tmp_path, capsys, name, text):
    (source / name).write_text(text)
    code, _, said = run_command(
        capsys, "convert", "--model", source, "--mlx-path", tmp_path / "out"
    )
    assert code == 2 and name in said and len(said) < 1000


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json", "a.txt"]
)
def test_a_file_of_8_gb_is_not_read(source, model, tmp_path, capsys, name):
    """It takes no room on the disk: nothing but its length is there."""
    before = current_platform().peak_process_bytes()
    for path in (source, model):
        with open(path / name, "ab") as f:
            os.truncate(f.fileno(), 8 << 30)
    out = tmp_path / "out"
    for command in (
        ("convert", "--model", source, "--mlx-path", out),
        ("generate", "--model", model, "--prompt", "hello"),
    ):
        code, _, said = run_command(capsys, *command)
        assert code in (1, 2) and name in said
    assert not out.exists()
    assert current_platform().peak_process_bytes() - before < 300e6


@pytest.mark.parametrize(
    "change",
    [
        {"layouts": [[]]},
        {"layouts": DEEPER},
        {"unit": ["neuron"]},
        {"dtype": ["BF16"]},
        {"quantization": {"mode": ["affine"]}},
        {"quantization": {"bits": 4, "group_size": 2**62, "mode": "affine"}},
        {"quantization": 7},
        {"files": {"tokenizer.json": {"bytes": 1.5, "sha256": ""}}},
        {"files": {"tokenizer.json": {"bytes": True, "sha256": ""}}},
        {"files": {"tokenizer.json": {"bytes": -1, "sha256": ""}}},
        {"rows_fingerprint": ["a"]},
        {"config_sha256": 7},
        {"format_version": [[2]] * 10_000},
        {"row_file": {"a": 1}},
    ],
)
def test_types_in_the_flash_object(model, change):
    config = json.loads((model / "config.json").read_text())
    edit_config(model, flash=config["flash"] | change)
    with pytest.raises(FlashError) as caught:
        ModelDirectory(model)
    assert len(str(caught.value)) < 1000


def rewritten(file, change):
    """Change a safetensors file's header, its data staying where they are."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def overlap(header):
    names = [name for name in header if name.endswith("self_attn.q_proj.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]


def shift(header):
    entry = header["model.norm.weight"]
    entry["data_offsets"] = [n + 2 for n in entry["data_offsets"]]


def narrower(header):
    header["model.embed_tokens.weight"]["dtype"] = "F8_E4M3"


@pytest.mark.parametrize("change", [overlap, shift, narrower])
def test_tensors_that_are_not_where_they_should_be(source, model, tmp_path, change):
    for path, kind in ((source, convert), (model, None)):
        rewritten(path / "model.safetensors", change)
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            convert(path, tmp_path / "out") if kind else ModelDirectory(path)


def test_a_header_one_byte_shorter(model):
    """It says the same, and all weights are read one byte early."""
    file = model / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert raw[8 + size - 1 : 8 + size] == b" "  # padding, which may be left out
    file.write_bytes((size - 1).to_bytes(8, "little") + raw[8:])
    with pytest.raises(DamagedError, match="its header says"):
        ModelDirectory(model)


def test_trailing_data_and_tensors_that_are_there_twice(source, tmp_path):
    file = source / "model.safetensors"
    shutil.copy(file, source / "model-copy.safetensors")
    with pytest.raises(DamagedError, match="in another weight file, too"):
        convert(source, tmp_path / "out")
    (source / "model-copy.safetensors").unlink()
    with open(file, "ab") as f:
        f.write(b"behind")
    with pytest.raises(DamagedError, match="longer than its tensors"):
        convert(source, tmp_path / "out")
