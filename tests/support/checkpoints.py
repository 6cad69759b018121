"""Changes to a checkpoint on disk, and checkpoints of mixtures."""

import json

import mlx.core as mx
from mlx_lm import utils
from support.tiny_mixtures import make_mixture, quantised

from mlx_flash.models.registry import get_classes


def edit_config(source, **changes):
    """Change keys of config.json; a value of ... takes the key out."""
    file = source / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(source, change):
    file = source / "model.safetensors"
    weights = mx.load(str(file))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(file), weights, {"format": "pt"})


MIXTURE_KINDS = {
    "float32": ("float32", None),
    "4 bit": ("float32", 4),
    "8 bit": ("float32", 8),
    "bfloat16": ("bfloat16", None),
    "4 bit in bfloat16": ("bfloat16", 4),
}
GROUP = 32


def mixture_checkpoint(path, model_type="mixtral", kind="float32", **overrides):
    """A tiny checkpoint of a mixture."""
    dtype, bits = MIXTURE_KINDS[kind]
    source = make_mixture(path / "hf", model_type, dtype, **overrides)
    return quantised(source, path / "quantised", bits, GROUP) if bits else source


def dense_of(source):
    return utils.load_model(source, get_model_classes=get_classes)[0]
