"""From what training changed to the adapter that ships: factors in int8, thresholds folded in.

The model's config has one threshold for all layers. A layer that was trained with t instead of t0
gets its gate multiplied by t0 / t and its up projection by t / t0: the same rows are active, and
the product of the two is what it was.

Knows: both sides' names, rounding. Does not know: training, how adapters are applied
(``mlx_flash.conversion.adapter``, whose format this is).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from safetensors.numpy import save_file

from mlx_flash.conversion.adapter import FORMAT, VERSION, sample

from . import student as students

BASE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
)


def rounded(a: torch.Tensor, b: torch.Tensor) -> dict[str, np.ndarray]:
    """int8 factors, one scale a rank."""
    a_codes, a_scale = by_row(a)
    b_codes, b_scale = by_row(b.T)
    return {"lora_a": a_codes, "lora_b": b_codes.T, "scale": a_scale * b_scale}


def by_row(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes, and float32 scales, one a row."""
    scale = matrix.abs().amax(dim=1).clamp(min=1e-12) / 127
    codes = (matrix / scale[:, None]).round().to(torch.int8)
    return codes.numpy(), scale.float().numpy()


def tensors(
    dense: torch.nn.Module, student: torch.nn.Module, activation: str
) -> tuple[dict[str, np.ndarray], float | None]:
    """Tensors of the file, and the threshold of the whole model (None but for fatrelu)."""
    found: dict[str, np.ndarray] = {}
    base = dict(dense.named_parameters())
    for name, module in student.named_modules():
        if isinstance(module, students.LoRALinear):
            parts = rounded(module.a.detach(), module.b.detach())
            if name.endswith("gate_proj"):
                parts["sample"] = np.array(sample(mx.array(module.weight.numpy())))
            found |= {f"{name}.{part}": array for part, array in parts.items()}
        elif type(module).__name__ == "LlamaRMSNorm":
            delta = module.weight.detach() - base[f"{name}.weight"]
            found[f"{name}.delta"] = delta.half().numpy()
    for i, ffn in enumerate(students.ffns(student)):
        if ffn.bypass is not None:
            codes, scale = by_row(ffn.bypass.detach())
            found[f"model.layers.{i}.bypass.codes"] = codes
            found[f"model.layers.{i}.bypass.row_scale"] = scale
    if activation != "fatrelu":
        return found, None
    thresholds = [ffn.threshold.item() for ffn in students.ffns(student)]
    whole = math.exp(np.mean(np.log(np.maximum(thresholds, 1e-6))))
    for i, threshold in enumerate(thresholds):
        factor = whole / max(threshold, 1e-6)
        for name, value in (("gate_proj", factor), ("up_proj", 1 / factor)):
            found[f"model.layers.{i}.mlp.{name}.factor"] = np.float32(value)
    return found, whole


def write(
    path: Path, dense: torch.nn.Module, student: torch.nn.Module, activation: str, card: str
) -> None:
    """Write the adapter; whole or not at all."""
    arrays, threshold = tensors(dense, student, activation)
    config = {"hidden_act": "relu"}
    if activation == "fatrelu":
        config = {"hidden_act": "fatrelu", "hidden_act_param": threshold}
    if students.ffns(student)[0].bypass is not None:
        config |= {"model_type": "bypass_llama", "architectures": ["BypassLlamaForCausalLM"]}
    elif activation == "drelu":
        config |= {"model_type": "bamboo", "architectures": ["BambooForCausalLM"]}
    base = dense.config.to_dict()
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "config": json.dumps(config),
        "base": json.dumps({key: base[key] for key in BASE_KEYS}),
        "card": card,
    }
    temporary = path.with_name(path.name + ".partial")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)
    temporary.replace(path)
