"""What tests of conversion share."""

import pytest
from support.tiny import make_checkpoint


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "hf", "llama", "bfloat16", layers=2)
