"""A mixture, for those who test how its experts are paged; buffers smaller than a layer."""

import functools

import pytest
from support.checkpoints import dense_of, mixture_checkpoint

from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.storage.reader import RowReader


@pytest.fixture
def reads(monkeypatch):
    """Reads through the page cache, of no bytes but those asked for."""
    reader = functools.partial(RowReader, direct=False, threads=2, gap_bytes=0)
    monkeypatch.setattr("mlx_flash.runtime.load.RowReader", reader)


@pytest.fixture(scope="session", params=["float32", "4 bit"])
def made(request, tmp_path_factory):
    """(directory, dense model) of a tiny Mixtral."""
    path = tmp_path_factory.mktemp("mixtral")
    source = mixture_checkpoint(path, "mixtral", request.param, num_hidden_layers=3)
    return ModelDirectory(convert(str(source), path / "flash")), dense_of(source)


@pytest.fixture(autouse=True, scope="module")
def in_pieces(small_buffers):
    """Layers take several pieces here; elsewhere buffers are of the size that ships."""
