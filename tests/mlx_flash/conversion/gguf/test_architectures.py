"""Every architecture of GGUF files against transformers' logits of the same weights.

Files are written as llama.cpp's converter does (fixtures/gguf_files.py), from what transformers
saved (fixtures/make_gguf_golden.py).
"""

import mlx.core as mx
import numpy as np
import pytest
from fixtures.gguf_files import GOLDEN, write_golden
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash import load
from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.gguf.architectures import ARCHITECTURES

CASES = sorted(file.stem for file in GOLDEN.glob("*.safetensors"))
CLOSE = 1e-4


def logits(model, tokens, whole):
    """Of a prompt in two parts and the rest token by token; or of all at once."""
    cache = make_prompt_cache(model)
    parts = [tokens[:10], tokens[10:20], *([token] for token in tokens[20:])]
    if whole:
        parts = [tokens]
    found = [np.array(model(mx.array([part]), cache=cache)[0]) for part in parts]
    return np.concatenate(found)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(tmp_path, name):
    case = write_golden(tmp_path / "tiny.gguf", name)
    out = convert(tmp_path / "tiny.gguf", tmp_path / "out", dtype="float32")
    mixture = "num_experts_per_tok" in case.config
    paged = {"cache_share": 0.5} if mixture else {"kept_share": 0.0}
    for options in ({"use_flash": False}, paged):
        model, _ = load(out, **options)
        # LongRope's factors depend on how long the text is, transformers' here on all of it.
        found = logits(model, case.tokens, whole="longrope" in name)
        if hasattr(model, "flash"):
            model.flash.close()
        difference = np.abs(found - case.logits).max()
        assert difference < CLOSE, f"{options}: {difference}"


def test_every_architecture_has_a_case():
    cases = {
        name.split("-12b")[0].removesuffix("-longrope").removesuffix("-linear") for name in CASES
    }
    assert cases == {*ARCHITECTURES, "mixtral"}
