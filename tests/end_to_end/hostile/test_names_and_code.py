"""A model from the internet reads and writes nothing outside of itself, and runs no code."""

import io
import json
import os
import sys

import pytest
from support.checkpoints import edit_config
from support.commands import run_command

from mlx_flash.conversion.convert import convert
from mlx_flash.errors import FlashError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.load import load, load_tokenizer

OUTSIDE = ("../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "a\nb", "x" * 300, 7)


def edit_flash(model, **changes):
    config = json.loads((model / "config.json").read_text())
    edit_config(model, flash=config["flash"] | changes)


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_in_a_model_directory_are_plain(model, name, capsys):
    files = json.loads((model / "config.json").read_text())["flash"]["files"]
    (model.parent / "secret").write_text("secret")
    if isinstance(name, str):
        edit_flash(model, files=files | {name: {"bytes": 6, "sha256": "0" * 64}})
        with pytest.raises(ModelError, match=r"plain name of a file|expected the name of a file"):
            ModelDirectory(model)
        code, _, said = run_command(capsys, "verify", "--model", model)
        assert code == 2 and "secret" not in said.replace("../secret", "")
    edit_flash(model, files=files, row_file=name)
    with pytest.raises(ModelError, match="row_file"):
        ModelDirectory(model)


def test_reorder_writes_nothing_outside(model, tmp_path, capsys):
    files = json.loads((model / "config.json").read_text())["flash"]["files"]
    (tmp_path / ".bashrc").write_text("mine")
    entry = {"bytes": 4, "sha256": "0" * 64}
    edit_flash(model, files=files | {"../.bashrc": entry})
    out = tmp_path / "deep" / "out"
    assert run_command(capsys, "reorder", "--model", model, "--out", out)[0] == 2
    assert not out.exists() and not (tmp_path / "deep" / ".bashrc").exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_shards_in_an_index_are_plain(source, name, tmp_path):
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json is not a safetensors index: the shard of"):
        convert(source, tmp_path / "out")


def test_a_link_that_leads_out_is_not_copied(source, tmp_path):
    (tmp_path / "private").write_text("private")
    (source / "README.md").symlink_to(tmp_path / "private")
    with pytest.raises(ModelError, match=r"README\.md is a link that leads out"):
        convert(source, tmp_path / "out")
    (source / "README.md").unlink()
    (source / "LICENSE").write_text("free")
    (source / "README.md").symlink_to("LICENSE")
    assert (convert(source, tmp_path / "out") / "README.md").read_text() == "free"


def test_a_link_that_leads_out_of_a_model_directory(model, tmp_path):
    (model / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (model / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ModelError, match=r"tokenizer\.json is a link that leads out"):
        ModelDirectory(model)


@pytest.mark.parametrize("layout", ["snapshot", "weights elsewhere", "directory"])
def test_links_that_people_have(source, tmp_path, layout):
    """The hub's cache; weights on another disk; a link to the directory itself."""
    if layout == "snapshot":
        blobs = tmp_path / "models--org--name" / "blobs"
        given = blobs.parent / "snapshots" / "0123abcd"
        for folder in (blobs, given):
            folder.mkdir(parents=True)
        for n, file in enumerate(sorted(source.iterdir())):
            file.rename(blobs / f"{n:064x}")
            (given / file.name).symlink_to(f"../../blobs/{n:064x}")
    elif layout == "weights elsewhere":
        given, disk = source, tmp_path / "disk"
        disk.mkdir()
        (source / "model.safetensors").rename(disk / "model.safetensors")
        (source / "model.safetensors").symlink_to(disk / "model.safetensors")
    else:
        given = tmp_path / "linked"
        given.symlink_to(source)
    out = convert(given, tmp_path / "out")
    assert not any(file.is_symlink() for file in out.iterdir())
    assert load_tokenizer(ModelDirectory(out)).encode("the")


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").write_text("")
from transformers import PreTrainedTokenizerFast
class Own(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_a_tokenizer_is_never_run(model, monkeypatch, capsys):
    (model / "own.py").write_text(CODE)
    file = model / "tokenizer_config.json"
    said = json.loads(file.read_text())
    said |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    file.write_text(json.dumps(said))
    config = json.loads((model / "config.json").read_text())
    files = config["flash"]["files"]
    files["tokenizer_config.json"]["bytes"] = file.stat().st_size
    edit_flash(model, files=files)
    answers = io.StringIO("yes\n" * 100)
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(ModelError, match=r"auto_map in tokenizer_config\.json: 'own\.Own'"):
        load(model)
    code, _, said = run_command(capsys, "generate", "--model", model, "--prompt", "hello")
    assert code == 2 and "never run" in said
    assert answers.tell() == 0 and not (model / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "vocab.txt"])
def test_a_pipe_is_not_waited_for(model, name):
    directory = ModelDirectory(model)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(FlashError, match="plain file"):
        load_tokenizer(directory)
