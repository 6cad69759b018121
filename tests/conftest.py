"""Options of the test run, and what all tests share."""

import pytest

from mlx_flash import row_stream


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
