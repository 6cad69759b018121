"""Options of the test run, and what all tests share."""

import gc
import os

# One thread each: as many processes as there are cores run tests (and OpenBLAS's threads spin while
# they wait: a product of small matrices took twenty times the processor). Before numpy is imported.
for _threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_threads, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings
from support.platforms import use_darwin

from mlx_flash.paging import row_stream

FSYNC = os.fsync
# The same examples every time, so that two runs differ by the code alone; with --whole others each
# time, and more.
settings.register_profile("same", deadline=None, derandomize=True, database=None)
settings.register_profile("whole", deadline=None, max_examples=300, print_blob=True)


def pytest_configure(config):
    config.addinivalue_line("markers", "durability: of power loss, with the system's own fsync")
    config.addinivalue_line("markers", "whole: run by make test-whole alone")
    config.addinivalue_line("markers", "deeper: run by make test-whole, too, over more")
    settings.load_profile("whole" if config.getoption("--whole") else "same")


def pytest_addoption(parser):
    parser.addoption(
        "--whole",
        action="store_true",
        help="every family in every type, 128 tokens of each (make test-whole)",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--whole"):
        return
    later = [item for item in items if item.get_closest_marker("whole")]
    config.hook.pytest_deselected(items=later)
    items[:] = [item for item in items if not item.get_closest_marker("whole")]


def pytest_collection_finish():
    """Modules stay: each load of a model collects garbage and would go through all of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_power_loss():
    """Files need not reach the disk, but where a test is about that (``durability``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(autouse=True)
def durability(request, monkeypatch):
    if request.node.get_closest_marker("durability"):
        monkeypatch.setattr(os, "fsync", FSYNC)


@pytest.fixture(scope="module")
def small_buffers():
    """Buffers for a quarter of a layer, as large models have: tiny layers would fit them whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_stream, "LEAST_BYTES", 0)
        yield


@pytest.fixture
def darwin(monkeypatch):
    """The package believes to run on a Mac; see ``support.platforms.use_darwin``."""
    return use_darwin(monkeypatch)
