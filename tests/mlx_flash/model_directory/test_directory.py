"""Model directories that are missing, foreign, damaged; the same message by every way in."""

import json
import os
import shutil

import pytest
from support.tiny import make_checkpoint

from mlx_flash import cli
from mlx_flash.common import files
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import DamagedError, FlashError, ModelError, RowFileError
from mlx_flash.model_directory.config import config_sha256
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.load import load


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model directory of two layers, its resident weights in several shards."""
    base = tmp_path_factory.mktemp("directory")
    source = make_checkpoint(base / "hf", "llama", "bfloat16", layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_flash.conversion.convert.SHARD_BYTES", 50_000)
        return convert(source, base / "out")


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refused(model, capsys, kind):
    """The message with which every command and ``load`` refuse a directory."""
    with pytest.raises(FlashError) as caught:
        load(model)
    assert type(caught.value) is kind
    with pytest.raises(kind):
        load(model, use_flash=False)
    for command in (
        ["generate", "--prompt", "hello", "--max-tokens", "2"],
        ["generate", "--prompt", "hello", "--max-tokens", "2", "--dense"],
        ["inspect"],
        ["verify"],
    ):
        capsys.readouterr()
        code = cli.main([*command, "--model", str(model)])
        printed = capsys.readouterr()
        assert code == caught.value.exit_code
        assert printed.err == f"mlx_flash: {caught.value}\n"
        assert printed.out == ""
    return str(caught.value)


def edit_config(model, change):
    file = model / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def verify(model, capsys):
    capsys.readouterr()
    code = cli.main(["verify", "--model", str(model)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed


def flip(file, at):
    """Change one bit; a negative place counts from the end."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_whole(model, capsys):
    directory = ModelDirectory(model)
    assert len(directory.shards) > 2
    assert directory.verify_bytes == sum(
        file.stat().st_size for file in model.iterdir() if file.name != "config.json"
    ) - (directory.rows.layers[0].offset)
    assert list(directory.verify()) == []
    code, printed = verify(model, capsys)
    assert code == 0
    files = len(directory.files)
    assert printed.out == f"{model}: 2 layers and {files} files as they were written\n"


def test_progress_of_verify(model):
    seen = []
    directory = ModelDirectory(model)
    assert list(directory.verify(seen.append)) == []
    assert sum(seen) == directory.verify_bytes


# Missing, foreign, from the future


def test_no_such_directory(tmp_path, capsys):
    message = refused(tmp_path / "nothing", capsys, ModelError)
    assert message == f"no such model directory: {tmp_path / 'nothing'}"
    (tmp_path / "file").write_text("x")
    assert "no such model directory" in refused(tmp_path / "file", capsys, ModelError)


def test_no_config(model, capsys):
    (model / "config.json").unlink()
    assert "has no config.json" in refused(model, capsys, ModelError)


def test_not_converted(tmp_path, capsys):
    source = make_checkpoint(tmp_path / "hf", "llama", layers=2)
    message = refused(source, capsys, ModelError)
    assert "is not an mlx_flash model directory" in message
    assert f"mlx_flash convert --model {source} --mlx-path OUT" in message


@pytest.mark.parametrize("version", [1, 3, 99, "2", None, 0])
def test_format_of_another_version(model, capsys, version):
    edit_config(model, lambda c: c["flash"].update(format_version=version))
    message = refused(model, capsys, ModelError)
    assert f"format version {version!r}, this version of mlx_flash reads 2" in message


def test_family_of_the_future(model, capsys):
    edit_config(model, lambda c: c.update(model_type="llama9"))
    assert "model_type 'llama9' is not a family" in refused(model, capsys, ModelError)


FLASH_KEYS = ("files", "row_file", "rows_fingerprint", "layouts", "unit", "dtype", "quantization")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in FLASH_KEYS
        for value in (..., None, 5, ["x"], {"bits": 3})
        if (key, value) != ("quantization", None)  # as it is
    ],
)
def test_flash_object_that_makes_no_sense(model, capsys, key, value):
    def change(config):
        config["flash"].pop(key)
        if value is not ...:
            config["flash"][key] = value

    edit_config(model, change)
    with pytest.raises((ModelError, RowFileError, DamagedError)) as caught:
        ModelDirectory(model)
    message = refused(model, capsys, type(caught.value))
    assert str(model) in message


@pytest.mark.parametrize("entry", [None, [], {"bytes": 1}, {"bytes": "x", "sha256": ""}])
def test_file_entry_of_another_type(model, capsys, entry):
    edit_config(model, lambda c: c["flash"]["files"].update({"tokenizer.json": entry}))
    assert "lacks a key, or one has another type" in refused(model, capsys, ModelError)


def test_weights_of_others(model, capsys):
    """mlx-lm loads whatever is called model*.safetensors."""
    shutil.copyfile(ModelDirectory(model).shards[0], model / "model-merged.safetensors")
    message = refused(model, capsys, ModelError)
    assert "not written by its conversion" in message
    assert "model-merged.safetensors" in message


def test_other_files_of_others_do_no_harm(model):
    (model / "notes.txt").write_text("mine")
    assert list(ModelDirectory(model).verify()) == []


# The row file


def test_row_file_missing(model, capsys):
    (model / "ffn_rows.safetensors").unlink()
    message = refused(model, capsys, DamagedError)
    assert f"{model / 'ffn_rows.safetensors'} is missing" in message


@pytest.mark.parametrize("cut", [1, 5000, 100_000])
def test_row_file_truncated(model, capsys, cut):
    file = model / "ffn_rows.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - cut)
    message = refused(model, capsys, DamagedError)
    assert "is truncated" in message
    assert f"{size - cut} bytes found, {size} expected" in message


@pytest.mark.parametrize("size", [0, 7, 100])
def test_row_file_truncated_in_its_header(model, capsys, size):
    os.truncate(model / "ffn_rows.safetensors", size)
    message = refused(model, capsys, RowFileError)
    assert str(model / "ffn_rows.safetensors") in message


def test_row_file_foreign(model, capsys):
    shutil.copyfile(ModelDirectory(model).shards[0], model / "ffn_rows.safetensors")
    assert "is not a row file" in refused(model, capsys, RowFileError)
    (model / "ffn_rows.safetensors").write_bytes(b"PK\x03\x04" * 3000)
    assert "is not a safetensors file" in refused(model, capsys, RowFileError)


def test_row_file_of_another_model(model, tmp_path, capsys):
    """Same family, same shapes: only the numbers differ."""
    other = make_checkpoint(tmp_path / "other", "llama", "bfloat16", layers=2, seed=9)
    convert(other, tmp_path / "converted")
    shutil.copyfile(tmp_path / "converted" / "ffn_rows.safetensors", model / "ffn_rows.safetensors")
    message = refused(model, capsys, RowFileError)
    assert "belongs to another model" in message


def test_row_layout_changed(model, capsys):
    """A header that is sound in itself, whose parts have changed places."""
    file = model / "ffn_rows.safetensors"
    data = file.read_bytes()
    swapped = data.replace(rb"\"name\": \"gate\"", rb"\"name\": \"GATE\"")
    swapped = swapped.replace(rb"\"name\": \"up\"", rb"\"name\": \"gate\"")
    swapped = swapped.replace(rb"\"name\": \"GATE\"", rb"\"name\": \"up\"")
    assert swapped != data
    assert len(swapped) == len(data)
    file.write_bytes(swapped)
    assert "its row layout is not the one" in refused(model, capsys, DamagedError)


def test_damaged_layers_are_named(model, capsys):
    directory = ModelDirectory(model)
    for layer in (0, 1):
        flip(directory.rows.path, directory.rows.layers[layer].offset + 777)
    code, printed = verify(model, capsys)
    assert code == 1
    first, second = printed.err.splitlines()
    assert first.startswith(f"mlx_flash: layer 0 of {directory.rows.path} is damaged: sha256 ")
    assert second.startswith(f"mlx_flash: layer 1 of {directory.rows.path} is damaged: sha256 ")
    assert printed.out == ""
    flip(directory.rows.path, directory.rows.layers[0].offset + 777)
    code, printed = verify(model, capsys)
    assert code == 1
    assert "layer 0" not in printed.err
    assert "layer 1" in printed.err


def test_padding_counts(model, capsys):
    """A row of 64 bfloat16 numbers has padding; it is hashed with the rest."""
    flip(model / "ffn_rows.safetensors", -1)
    code, printed = verify(model, capsys)
    assert code == 1
    assert "layer 1" in printed.err


# Other files


def test_damaged_files_are_named(model, capsys):
    shard = ModelDirectory(model).shards[1]
    flip(shard, -5)
    flip(model / "tokenizer.json", 100)
    code, printed = verify(model, capsys)
    assert code == 1
    assert len(printed.err.splitlines()) == 2
    assert f"{shard} is damaged" in printed.err
    assert f"{model / 'tokenizer.json'} is damaged" in printed.err


def test_config_changed(model, capsys):
    edit_config(model, lambda c: c.update(rope_theta=20000.0))
    load(model)
    code, printed = verify(model, capsys)
    assert code == 1
    assert f"{model / 'config.json'} was changed" in printed.err


def test_config_written_anew_is_the_same(model):
    """The hash is of what config.json says, not of its spaces."""
    file = model / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(config.items()))))
    assert list(ModelDirectory(model).verify()) == []
    config["flash"]["config_sha256"] = "0" * 64
    assert config_sha256(config) == config_sha256(json.loads(file.read_text()))


def test_shard_missing(model, capsys):
    shard = ModelDirectory(model).shards[1]
    shard.unlink()
    assert f"{shard} is missing" in refused(model, capsys, DamagedError)


def test_shard_truncated(model, capsys):
    shard = ModelDirectory(model).shards[1]
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    message = refused(model, capsys, DamagedError)
    assert f"{shard} has {size - 1} bytes, expected {size}" in message


def test_disk_that_fails_under_verify(model, capsys, monkeypatch):
    def sha256_of(path, _progress):
        if path.name == "tokenizer.json":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    real = files.sha256_of
    monkeypatch.setattr("mlx_flash.model_directory.directory.sha256_of", sha256_of)
    code, printed = verify(model, capsys)
    assert code == 1
    assert f"reading {model / 'tokenizer.json'}: Input/output error" in printed.err
