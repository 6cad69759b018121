"""A config that ties its head beside files that have one."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils
from support import tiny
from support.checkpoints import edit_weights
from support.parity import logits

from mlx_flash import load
from mlx_flash.conversion import tied_head
from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.huggingface import HFCheckpoint
from mlx_flash.errors import ModelError
from mlx_flash.models.registry import make_model

NAMES = tuple(f"{name}.weight" for name in tied_head.EMBEDDINGS)
HEADS = {"internlm2": "output.weight", "llama4_text": "output.weight"}  # lm_head.weight elsewhere
# Families whose model in mlx-lm uses the embedding, whatever the config says.
NO_HEAD = ("afm7", "cohere", "cohere2", "gemma", "gemma2", "gpt2", "hunyuan", "lfm2", "lille-130m")
NO_HEAD += ("openelm",)
FAILS = ("baichuan_m1",)  # mlx-lm's own model cannot be tied


def ties(family):
    """Whether a family's model has no head where its config says so."""
    try:
        return not tied_head.has_head(make_model(tiny.config(family, tie_word_embeddings=True)))
    except ModelError:
        return False  # the family's head is never tied


def has_head(checkpoint):
    return bool(checkpoint.shapes.keys() & {"lm_head.weight", "output.weight"})


@pytest.mark.parametrize(
    "family", [family for family in tiny.TINY if ties(family) and family not in FAILS]
)
def test_every_family(family, tmp_path):
    """The same matrix again is left out; another one is the model's head, or refused."""
    tiny.make_checkpoint(tmp_path, family, tie_word_embeddings=True)
    file = str(tmp_path / "model.safetensors")
    weights = mx.load(file)
    table = next(name for name in weights if name.endswith(NAMES))
    for factor, own in ((1.0, False), (1.5, True)):
        head = {HEADS.get(family, "lm_head.weight"): weights[table] * factor}
        mx.save_safetensors(file, weights | head, {"format": "pt"})
        if own and family in NO_HEAD:
            with pytest.raises(ModelError, match=f"differs from the embedding, but a {family}"):
                HFCheckpoint(tmp_path)
        else:
            assert has_head(HFCheckpoint(tmp_path)) == own


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("own", [False, True])
def test_logits(bits, own, tmp_path):
    """Of floats and of mlx-lm's own quantisation: those of mlx-lm's model with that head."""
    source = tiny.make_checkpoint(tmp_path / "hf", "llama", tie_word_embeddings=not own)
    if bits:
        model, config = utils.load_model(source, lazy=True)
        _, config = utils.quantize_model(model, config, 32, bits)
        utils.save_model(source, model, donate_model=False)
        utils.save_config(config, source / "config.json")
    expected = logits(utils.load_model(source)[0])

    def left_in(weights):
        for name in [n for n in weights if "embed_tokens" in n and not own]:
            weights[name.replace("model.embed_tokens", "lm_head")] = weights[name]

    edit_weights(source, left_in)
    text = (source / "config.json").read_text()
    tied = text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    assert '"tie_word_embeddings": true' in tied
    (source / "config.json").write_text(tied)
    out = convert(source, tmp_path / "m")
    for share in (0.0, 1.0):
        found = logits(load(out, kept_share=share)[0])
        assert mx.allclose(found, expected, atol=1e-5)
    if own and not bits:  # mlx-lm throws the head away
        assert mx.abs(logits(utils.load_model(source)[0]) - expected).max() > 0.1


def test_what_is_compared(tmp_path):
    """Bytes, types and shapes; in blocks, the last one short."""
    a = np.arange(300_000, dtype=np.float32)
    weights = {"a.embed_tokens.weight": a, "lm_head.weight": a.copy()}
    file = tmp_path / "model.safetensors"

    def own(**changes):
        found = {name: mx.array(w) for name, w in (weights | changes).items()}
        mx.save_safetensors(str(file), found)
        model = make_model(tiny.config("llama", layers=1, tie_word_embeddings=True))
        assert "lm_head" not in dict(tree_flatten(model.parameters()))
        return tied_head.head_left_in(model, [file])

    assert own() == ({"lm_head.weight"}, False)
    late = a.copy()
    late[-1] += 1
    assert own(**{"lm_head.weight": late})[1]
    assert own(**{"lm_head.weight": a.reshape(2, -1)})[1]
    assert own(**{"lm_head.weight": a.view(np.int32)})[1]
    assert own(**{"lm_head.scales": a})[1]
