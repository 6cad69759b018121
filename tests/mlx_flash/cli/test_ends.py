"""Beyond the last position and the last token there is one line, from every entry."""

import warnings

import mlx.core as mx
import pytest
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache
from support.commands import run_command
from support.tiny import make_checkpoint, write_tokenizer

from mlx_flash import load
from mlx_flash.calibration.text_run import tokenised
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import FlashWarning, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.memory_requirements import default_context

WAYS = ({"kept_share": 0.0}, {"kept_share": 1.0}, {"use_flash": False}, {})
RAW = ("--ignore-chat-template", "--prompt")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Learned positions for 64 tokens, said by n_positions alone."""
    path = tmp_path_factory.mktemp("gpt2")
    make_checkpoint(path / "hf", "gpt2", layers=2, n_positions=64, n_ctx=64)
    return convert(path / "hf", path / "m")


@pytest.fixture(scope="module")
def yarn(tmp_path_factory):
    """A yarn of factor 4 beside 128 positions, as Qwen's cards say for long texts."""
    path = tmp_path_factory.mktemp("yarn")
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    make_checkpoint(
        path / "hf", "llama", layers=2, max_position_embeddings=128, rope_scaling=scaling
    )
    return convert(path / "hf", path / "m")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def more_tokens(request, tmp_path_factory):
    """A tokenizer with three tokens that the embedding has no rows for."""
    path = tmp_path_factory.mktemp("tokens")
    make_checkpoint(path / "hf", "llama", layers=2, tie_word_embeddings=request.param)
    write_tokenizer(path / "hf", 303)
    return convert(path / "hf", path / "m")


def test_learned_positions(gpt2, capsys):
    text = "x" * 50
    for way in ((), ("--dense",), ("--ram", "1GB")):
        code, _, err = run_command(
            capsys, "generate", "--model", gpt2, *RAW, text, "--max-tokens", 60, *way
        )
        assert code == 2 and "50 prompt tokens and --max-tokens 60 are more than the 64" in err
    code, _, err = run_command(capsys, "bench", "--model", gpt2, "--ram", "1GB")
    assert code == 2 and "more than the 64 positions" in err
    assert run_command(capsys, "generate", "--model", gpt2, *RAW, text, "-m", 14)[0] == 0
    directory = ModelDirectory(gpt2)
    assert directory.positions == default_context(directory) == 64
    assert tokenised(directory, None, 1024, 0).length == 64


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_learned_positions_from_python(gpt2, way):
    """All 64 positions, and then an error; what came before is not lost."""
    model, tokenizer = load(gpt2, **way)
    tokenizer.eos_token_ids = set()
    found = []
    with warnings.catch_warnings(), pytest.raises(ModelError, match="65 tokens are more than"):
        warnings.simplefilter("error", FlashWarning)  # it is an error, and not a warning besides
        for step in stream_generate(model, tokenizer, [5] * 50, max_tokens=60):
            found.append(step.token)
    assert len(found) >= 13
    with pytest.raises(ModelError, match="110 tokens are more than the 64"):
        model(mx.zeros((1, 110), mx.int32))


def test_a_limit_scaled_by_rope(yarn, capsys):
    text = "x" * 200
    assert run_command(capsys, "generate", "--model", yarn, *RAW, text, "-m", 4)[0] == 0
    code, _, err = run_command(capsys, "generate", "--model", yarn, *RAW, text, "-m", 400)
    assert code == 2 and "more than the 512 positions" in err


def test_rotary_positions_from_python(yarn):
    """They go on, as in mlx-lm, with a word, once."""
    model, _ = load(yarn, kept_share=0.0)
    cache = make_prompt_cache(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashWarning)
        model(mx.zeros((1, 512), mx.int32), cache=cache)
    with pytest.warns(FlashWarning, match="513 tokens are more than the 512 positions"):
        model(mx.zeros((1, 1), mx.int32), cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashWarning)
        model(mx.zeros((1, 1), mx.int32), cache=cache)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_tokens_beyond_the_embedding(more_tokens, way):
    model, tokenizer = load(more_tokens, **way)
    for tokens in ([4, 302], [300]):
        with pytest.raises(ModelError, match=f"token {tokens[-1]} is outside .* has 300 tokens"):
            list(stream_generate(model, tokenizer, tokens, max_tokens=2))
    assert len(list(stream_generate(model, tokenizer, [4, 299], max_tokens=2))) > 0
