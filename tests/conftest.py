"""Options of the test run, and what all tests share."""

import functools

import pytest
from hypothesis import settings
from support.platforms import use_darwin

from mlx_flash.paging import row_stream
from mlx_flash.storage.reader import RowReader

# The same examples every time, so that two runs differ by the code alone; with --whole others each
# time, and more.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("whole", deadline=None, max_examples=300, print_blob=True)


def pytest_configure(config):
    settings.load_profile("whole" if config.getoption("--whole") else "same")


def pytest_addoption(parser):
    parser.addoption(
        "--whole",
        action="store_true",
        help="128 tokens of every family in every type and share (make test-whole)",
    )


@pytest.fixture(autouse=True, scope="session")
def small_buffers():
    """Buffers for a quarter of a layer, as large models have: tiny layers would fit them whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_stream, "LEAST_BYTES", 0)
        yield


@pytest.fixture
def page_cache(monkeypatch):
    """Reads through the page cache: what is read is the same, and hundreds of runs are quicker."""
    reader = functools.partial(RowReader, direct=False, threads=2)
    monkeypatch.setattr("mlx_flash.runtime.load.RowReader", reader)


@pytest.fixture
def darwin(monkeypatch):
    """The package believes to run on a Mac; see ``support.platforms.use_darwin``."""
    return use_darwin(monkeypatch)
