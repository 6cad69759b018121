"""The paged model against the dense one: the same logits to the bit, the same tokens."""

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm import generate as mlx_generate
from mlx_lm import utils
from mlx_lm.models.cache import make_prompt_cache
from support.parity import TOKENS, greedy, is_greedy, logits
from support.tiny import make_checkpoint

from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.families import FAMILIES
from mlx_flash.models.registry import get_classes
from mlx_flash.runtime.load import load, load_model
from mlx_flash.runtime.options import PagingOptions

BOTH = ("gemma2", "gpt2", "llama", "qwen3")


def cases():
    """Every family in both types; of the larger part of them make test has one, by turns."""
    for number, family in enumerate(sorted(FAMILIES)):
        for turn, dtype in enumerate(("float32", "bfloat16")):
            later = family not in BOTH and number % 2 != turn
            yield pytest.param(family, dtype, marks=[pytest.mark.whole] if later else [])


@pytest.mark.deeper
@pytest.mark.parametrize(("family", "dtype"), cases())
def test_same_as_dense(tmp_path, request, family, dtype):
    """Logits with no layer kept and 30 %; tokens with some kept.

    With ``--whole`` (make test-whole) tokens every time, and with all kept, where the modules are
    the dense model's own.
    """
    whole = request.config.getoption("--whole")
    shares = (0.0, 0.3, 1.0) if whole else (0.0, 0.3)
    talks, count = (shares, TOKENS) if whole else ((0.3,), 96)
    source = make_checkpoint(tmp_path / "hf", family, dtype)
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    dense, _ = utils.load_model(source, get_model_classes=get_classes)
    tokens = greedy(dense, count) if whole else []
    # gpt2 and baichuan load transposed views, which another kernel sums in another order.
    dense.update(tree_map(mx.contiguous, dense.parameters()))
    expected = logits(dense)
    for share in shares:
        model = load_model(directory, PagingOptions(kept_share=share))
        assert len(model.flash.plan.kept) == round(share * len(directory.rows.layers))
        assert mx.array_equal(logits(model), expected), f"logits at share {share}"
        if share in talks:
            found = greedy(model, count)
            assert len(found) == count and len(set(found)) > 1
            assert found == tokens if whole else is_greedy(dense, found), f"share {share}"
        assert (model.flash.stats().misses > 0) == (share < 1)
        model.flash.close()


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", *(pytest.param(t, marks=pytest.mark.whole) for t in ("float32", "float16"))],
)
def test_ten_layers_three_kept(tmp_path, dtype):
    source = make_checkpoint(tmp_path / "hf", "llama", dtype, layers=10)
    convert(str(source), tmp_path / "flash")
    dense, tokenizer = utils.load(str(source))
    model, _ = load(tmp_path / "flash", kept_share=0.3)
    assert len(model.flash.plan.kept) == 3
    assert greedy(model) == greedy(dense)
    expected = mlx_generate(dense, tokenizer, "Ahoy", max_tokens=16)
    assert mlx_generate(model, tokenizer, "Ahoy", max_tokens=16) == expected


def test_wide_rows_scatter(tmp_path):
    """Parts of a page and more go to their slots without a copy; the numbers are the same."""
    source = make_checkpoint(
        tmp_path / "hf", "llama", "float32", hidden_size=1024, num_attention_heads=8, head_dim=32
    )
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    model = load_model(directory, PagingOptions(kept_share=0.3))
    assert model.flash.reader.file.layout.scatters
    dense, _ = utils.load_model(source)
    assert mx.array_equal(logits(model), logits(dense))
    assert greedy(model, 32) == greedy(dense, 32)


def test_padded_parts(tmp_path):
    """d_model 960 in bfloat16 is padded to whole sectors; the padding takes part in nothing."""
    source = make_checkpoint(
        tmp_path / "hf", "starcoder2", "bfloat16", hidden_size=960, num_attention_heads=4
    )
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    layout = directory.rows.layout
    assert layout.extents[0] > layout.parts[0].nbytes
    model = load_model(directory, PagingOptions(kept_share=0.0))
    dense, _ = utils.load_model(source, get_model_classes=get_classes)
    assert mx.array_equal(logits(model), logits(dense))
    assert greedy(model, 32) == greedy(dense, 32)


def test_prompt_in_chunks(tmp_path):
    """A prompt longer than the plan's chunk gives the logits of the whole prompt."""
    source = make_checkpoint(tmp_path / "hf", "llama", "float32")
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    model = load_model(directory, PagingOptions(kept_share=0.0))
    model.flash.plan = model.flash.plan.replace(step=16)
    dense, _ = utils.load_model(source)
    prompt = [(7 * i) % 250 + 3 for i in range(75)]
    cache = make_prompt_cache(model)
    before = model.flash.stats().forwards
    found = model(mx.array([prompt]), cache=cache)
    assert model.flash.stats().forwards - before == 5
    expected = dense(mx.array([prompt]), cache=make_prompt_cache(dense))
    assert mx.abs(found - expected).max() < 1e-4
    assert greedy(model, prompt=prompt) == greedy(dense, prompt=prompt)


def test_broken_off_forward(tmp_path):
    """After a forward pass that stopped half way the next one starts at the first layer again."""
    source = make_checkpoint(tmp_path / "hf", "llama", "float32")
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    model = load_model(directory, PagingOptions(kept_share=0.0))
    expected = greedy(model, 8)
    x = mx.zeros((1, 1, model.args.hidden_size))
    model.layers[0].mlp(x)
    model.layers[1].mlp(x)
    assert greedy(model, 8) == expected


def test_dense_of_the_same_directory(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "gemma2", "bfloat16")
    convert(str(source), tmp_path / "flash")
    model, _ = load(tmp_path / "flash", use_flash=False)
    assert not hasattr(model, "flash")
    dense, _ = utils.load_model(source)
    assert mx.array_equal(logits(model), logits(dense))
