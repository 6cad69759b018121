"""Directories may have any name, be links, and be named from where one then leaves."""

import json
import os

import mlx.core as mx
import pytest
from mlx_lm import stream_generate
from support.commands import run_command
from support.tiny import make_checkpoint

from coreml_export.cli import main as coreml_export
from mlx_flash import load
from mlx_flash.common.files import beside
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory

NAMES = (
    "tiny [4-bit] (v2)",
    "модель 模型 é",
    "a%20b#c*d?",
    'quote\'s "double" $HOME `x`; {y} ~',
    "[a-c]*" + "n" * 244,
    "ж" * 125,
)
TOKENS = [5, 6, 7]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("hf") / "hf", "opt", layers=2)


def names_in(path):
    return sorted(file.name for file in path.iterdir())


def tokens(model, tokenizer):
    return [step.token for step in stream_generate(model, tokenizer, TOKENS, max_tokens=4)]


@pytest.fixture(scope="module")
def expected(source):
    return tokens(*load(convert(source, source.with_name("plain"))))


@pytest.mark.parametrize("name", NAMES)
def test_names(name, source, expected, tmp_path, capsys):
    """Of the checkpoint and of what is made from it, and of folders above."""
    hf, out = tmp_path / name / name, tmp_path / "folder [x]" / name
    hf.parent.mkdir()
    hf.symlink_to(source, target_is_directory=True)
    assert run_command(capsys, "convert", "--model", hf, "--mlx-path", out)[0] == 0
    assert names_in(out.parent) == [name]
    assert run_command(capsys, "verify", "--model", out)[0] == 0
    code, printed, _ = run_command(capsys, "inspect", "--model", out)
    assert code == 0 and name in printed
    how = ("--prompt", "the", "--max-tokens", "2")
    for way in ((), ("--dense",)):
        assert run_command(capsys, "generate", "--model", out, *how, *way)[0] == 0
    for options in ({}, {"kept_share": 0.0}, {"use_flash": False}):
        assert tokens(*load(out, **options)) == expected
    assert run_command(capsys, "convert", "--model", hf, "--mlx-path", out, "--force")[0] == 0
    assert names_in(out.parent) == [name]


def test_calibrate_and_export(source, tmp_path, capsys):
    name = NAMES[-2]
    out, package = tmp_path / name, tmp_path / f"p{name[1:]}"
    convert(source, out)
    how = ("--tokens", 1024, "--rank", 4, "--max-loss", 1000)
    code, _, err = run_command(capsys, "calibrate", "--model", out, *how)
    assert code == 0, err
    assert (out / "calibration.json").is_file()
    assert coreml_export([str(out), "-o", str(package), "--context", "64", "--no-verify"]) == 0
    assert json.loads((package / "manifest.json").read_text())["context"] == 64
    assert names_in(tmp_path) == sorted([name, package.name])


def test_relative_paths_and_a_later_chdir(source, expected, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("m")
    monkeypatch.chdir(tmp_path)
    convert(os.path.relpath(source), "m")
    models = [load(path, kept_share=share) for path in ("m", "link") for share in (0.0, 1.0)]
    directory = ModelDirectory("m")
    monkeypatch.chdir("elsewhere")
    assert [tokens(*model) for model in models] == [expected] * 4
    assert list(directory.verify()) == []
    assert mx.isfinite(models[0][0](mx.array([TOKENS]))).all()


def test_names_that_lie_beside_others(tmp_path):
    """A suffix makes no name too long, and two long names stay two."""
    assert beside(tmp_path / "model", ".partial") == tmp_path / "model.partial"
    made = {beside(tmp_path / f"{'é' * 124}{i}", ".partial") for i in range(3)}
    assert len(made) == 3
    for path in made:
        path.mkdir()
        assert path.name.endswith(".partial")
