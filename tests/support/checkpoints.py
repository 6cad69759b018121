"""Changes to a checkpoint on disk."""

import json

import mlx.core as mx


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
