"""A tiny checkpoint and its model directory, one of each for all tests, and copies to spoil."""

import shutil

import pytest
from support.tiny import make_checkpoint

from mlx_flash.conversion.convert import convert


@pytest.fixture(scope="package")
def whole(tmp_path_factory):
    """(checkpoint, model directory) of two layers of llama with ReLU, whose rows are predicted."""
    base = tmp_path_factory.mktemp("hostile")
    source = make_checkpoint(base / "hf", "llama", "bfloat16", layers=2, hidden_act="relu")
    return source, convert(source, base / "out")


@pytest.fixture
def source(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "hf")


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole[1], tmp_path / "model")
