"""Which tensor of a GGUF each parameter of mlx-lm's model is, or which rows of one.

Names come from the gguf package's own map, which knows transformers' names; what mlx-lm names
otherwise (stacked experts, norms of single heads) is told here. Shapes are held against the model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_flash.errors import ModelError

from . import rope
from .header import Tensor, some

ARCHS = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
MOST_LAYERS = 1024  # several times that of any model known
_BLOCK = re.compile(r"blk\.(\d{1,9})\.(.+)")
_EXPERTS = re.compile(r".*\.layers\.(\d+)\..*\.(gate|up|down)_proj")
_HEAD_NORM = re.compile(r"(.*\.[qk]_layernorm)\.norms\.(\d+)")


@dataclass(frozen=True)
class Place:
    """Where a parameter's numbers lie.

    Args:
        tensor: in the file.
        shape: of the parameter; the tensor's, up to dimensions of size 1, or that of one row.
        row: which row of the tensor the parameter is; None for all of it.
        matrix: it is the weight of a linear layer or an embedding, which may stay quantised.
        head_dim: rows (of a bias: numbers) lie in GGUF's order of Q and K, by heads of that size;
            0 for those that do not.
        offset: what the converter added to every number.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    row: int | None = None
    matrix: bool = False
    head_dim: int = 0
    offset: float = 0.0


def check_layers(tensors: Mapping[str, Tensor], layers: int, model_type: str) -> None:
    """Raises ModelError for more layers than the file has tensors of, before a model is made.

    Args:
        layers: how many the metadata say.
    """
    blocks: dict[int, list[str]] = {}
    for name in tensors:
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match[1]), []).append(match[2])
    if absent := layers - len(blocks):
        first = next((i for i in range(len(blocks)) if i not in blocks), len(blocks))
        kinds = blocks.get(0, ["attn_norm.weight"])
        missing = [f"blk.{first}.{kind}" for kind in kinds]
        if absent > 0:
            more = len(kinds) * (absent - 1)
            shown = some(missing) + (f" and {more} more" if more else "")
            raise ModelError(
                f"wrong tensors for a {model_type} of {layers} layers; missing: {shown}; "
                "unknown: none"
            )
    if layers > MOST_LAYERS:
        raise ModelError(f"{layers} layers; expected at most {MOST_LAYERS}")


def find_places(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    arch: str,
    config: Mapping[str, Any],
    *,
    permuted: bool,
    norm_offset: float,
) -> dict[str, Place]:
    """Parameter of mlx-lm's model -> its place.

    Args:
        model: mlx-lm's, of ``config``, not quantised.
        tensors: all in the file, by name.
        arch: the file's architecture.
        permuted, norm_offset: see ``Architecture``.

    Raises:
        ModelError: the file lacks a tensor, has one that the model does not, or one of another
            shape.
    """
    parameters = dict(tree_flatten(model.parameters()))
    if config.get("tie_word_embeddings"):
        parameters.pop("lm_head.weight", None)
    layers = config["num_hidden_layers"]
    known = get_tensor_name_map(ARCHS[arch], layers)
    sources = {
        name: _source(name, known.get_name(name, (".weight", ".bias"))) for name in parameters
    }
    found = {source for source, _ in sources.values()}
    missing = [
        source for source in dict.fromkeys(s for s, _ in sources.values()) if source not in tensors
    ]
    unknown = [name for name in tensors if name not in found and name not in rope.TENSORS]
    if missing or unknown:
        raise ModelError(
            f"wrong tensors for a {config['model_type']} of {layers} layers; "
            f"missing: {some(missing) or 'none'}; unknown: {some(unknown) or 'none'}"
        )
    matrices = _matrices(model)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    places = {}
    for name, (source, row) in sources.items():
        rotated = permuted and name.rsplit(".", 2)[-2] in ("q_proj", "k_proj")
        places[name] = Place(
            tensors[source],
            tuple(parameters[name].shape),
            row,
            name in matrices,
            head_dim if rotated else 0,
            norm_offset if source.endswith("norm.weight") else 0.0,
        )
    _check_shapes(places)
    return places


def _source(name: str, mapped: str | None) -> tuple[str, int | None]:
    """The tensor's name in the file, and the row of it that the parameter is (None: all)."""
    path, _, part = name.rpartition(".")
    if mapped is None and (match := _HEAD_NORM.fullmatch(path)):
        layer = re.search(r"\.layers\.(\d+)\.", path)
        kind = "q" if path.split(".norms.")[0].endswith("q_layernorm") else "k"
        return f"blk.{layer[1] if layer else ''}.attn_{kind}_norm.{part}", int(match[2])
    if mapped is None and (match := _EXPERTS.fullmatch(path)):
        return f"blk.{match[1]}.ffn_{match[2]}_exps.{part}", None
    if mapped is None:
        return f"(none for {name})", None
    # The map's names of parameters without a part of their own, such as sinks, lack the suffix.
    return (mapped if mapped.endswith((".weight", ".bias")) else f"{mapped}.weight"), None


def _matrices(model: nn.Module) -> set[str]:
    """Parameters that mlx-lm can hold quantised."""
    kinds = (nn.Linear, nn.Embedding, SwitchLinear)
    return {f"{path}.weight" for path, m in model.named_modules() if isinstance(m, kinds)}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without dimensions of size 1, which the converter leaves out."""
    return tuple(n for n in shape if n != 1)


def _check_shapes(places: Mapping[str, Place]) -> None:
    rows = Counter(place.tensor.name for place in places.values() if place.row is not None)
    wrong = []
    for place in places.values():
        tensor, expected = place.tensor, place.shape
        if place.row is not None:
            expected = (rows[tensor.name], *expected)
        plain = _squeezed(tensor.shape) == _squeezed(expected)
        if not plain or tensor.shape[-1] % GGML_QUANT_SIZES[tensor.type][0]:
            wrong.append(f"{tensor.name} {tensor.shape}, expected {expected}")
    if wrong:
        raise ModelError(f"shapes that contradict the metadata or the type: {some(wrong)}")
