"""A GGUF file, or the shards of one, as a checkpoint: mlx-lm's names, a config and a tokenizer.

``architectures`` lists what is read. Tensors stay quantised (``block_formats`` says how) or become
floats, and what llama.cpp's converter changed is undone, so that the result is the model that
transformers has. Whatever would be computed differently is an error. Every check is made when the
object is built, before any tensor is read (but for the few floats of rope's factors).
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.common.files import digest_of
from mlx_flash.conversion.adapter import Adapter
from mlx_flash.conversion.checkpoint import CheckpointFacts
from mlx_flash.conversion.model_spec import ModelSpec
from mlx_flash.errors import FlashError, ModelError
from mlx_flash.models.dtypes import FLOATS
from mlx_flash.models.registry import make_model
from mlx_flash.models.settings.normalise import settle

from . import rope, tokenizer
from .architectures import Architecture, find_architecture, model_config
from .block_formats import SourceScheme, source_scheme
from .header import Tensor, naming
from .keys import Keys
from .names import Place, check_layers, find_places
from .shards import open_source
from .tensors import packed_dtypes, packed_shapes, read_floats, read_packed, read_vector

PARTS = ("weight", "scales", "biases")  # of a quantised matrix


class GGUFCheckpoint:
    """A GGUF under the names of mlx-lm's model; see ``checkpoint.Checkpoint``.

    A quantised matrix X is three tensors, as mlx-lm names them: ``X.weight`` (packed codes),
    ``X.scales`` and ``X.biases``; ``config["quantization"]`` says how they are packed.

    Args:
        path: the file; of a model in shards, the first.
        dtype: "float16", "bfloat16" or "float32" for all floats, scales and biases among them.
            Default: float16 if any matrix stays quantised, as the file has its scales, but
            bfloat16 for gemma and gpt-oss, whose activations float16 cannot hold; bfloat16 if any
            tensor is quantised and made floats, or is bfloat16; else float16 if any is,
            else float32. bfloat16 rounds scales and biases (relative error up to 2^-8); float32
            holds the scales of every type whose codes are kept. On a CPU, MLX 0.32 multiplies
            quantised matrices with sums in that type: float32 is the fast and the accurate one.
        dequantize: make floats of all tensors.
        adapter: what changes the model; all tensors are made floats for it.

    Raises:
        ModelError: the file is of a kind that is not read, or contradicts itself.
        DamagedError: it is cut off, or breaks the format's rules.
    """

    def __init__(
        self,
        path: Path,
        dtype: str | None = None,
        dequantize: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        if dtype is not None and dtype not in FLOATS:
            raise ModelError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
        self.path = Path(path).absolute()
        self._adapter = adapter
        source = open_source(self.path)
        self._meta = source.meta
        with naming(self.path):
            entry, keys = find_architecture(source.meta)
            tensors = {t.name: t for t in source.tensors}
            self.config, self._places = find_model(entry, keys, source.meta, tensors)
        floats = dequantize or adapter is not None
        self._schemes = {} if floats else _schemes(self._places)
        dtype = dtype or _default_dtype(source.tensors, bool(self._schemes), entry.wide)
        self._dtype = FLOATS[dtype]
        self.config["torch_dtype"] = dtype
        if self._schemes:
            self.config["quantization"] = _quantisation(self._schemes)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype] = {}
        for name, place in self._places.items():
            self._list(name, place)
        self.fingerprint = digest_of(source.fingerprint)
        if adapter:
            self._adapt(adapter)
        self.facts = CheckpointFacts(requantised=_requantised(self._places, self._schemes))
        self._taken: tuple[str, dict[str, mx.array]] = ("", {})

    @cached_property
    def spec(self) -> ModelSpec:
        """Where the model's FFNs are."""
        return ModelSpec.of(self.config, self.path)

    def _list(self, name: str, place: Place) -> None:
        path = name.removesuffix(".weight")
        scheme = self._schemes.get(path) if path != name else None
        if scheme is None:
            self.shapes[name], self.dtypes[name] = place.shape, self._dtype
            return
        for part, shape in packed_shapes(place.tensor, scheme).items():
            self.shapes[f"{path}.{part}"] = shape
            self.dtypes[f"{path}.{part}"] = packed_dtypes(scheme, self._dtype)[part]

    def _adapt(self, adapter: Adapter) -> None:
        self.config = adapter.adapted_config(self.config)
        adapter.check_names(self.shapes)
        self.shapes |= adapter.added
        self.dtypes |= dict.fromkeys(adapter.added, self._dtype)
        self.fingerprint += adapter.sha256[:16]

    def take(self, name: str) -> mx.array:
        """The evaluated tensor; reads the bytes of that tensor and no others.

        The three parts of a quantised matrix lie together in the file: the parts not asked for are
        kept until they are taken or the next tensor is. Taken one after another, they are read
        once.

        Raises:
            ModelError: there is no such tensor, or a float type cannot hold its numbers.
            DamagedError, ReadError: it cannot be read.
        """
        if name not in self.shapes:
            raise ModelError(f"{self.path}: no tensor {name!r} among its {len(self.shapes)}")
        if self._adapter is None:
            return self._read(name)
        base = None if name in self._adapter.added else self._read(name)
        adapted = self._adapter.adapt(name, base, self._dtype)
        mx.eval(adapted)
        return adapted

    def _read(self, name: str) -> mx.array:
        path, _, part = name.rpartition(".")
        scheme = self._schemes.get(path) if part in PARTS else None
        if scheme is None:
            with naming(self.path):
                return read_floats(self._places[name], self._dtype)
        held, parts = self._taken
        if path != held or part not in parts:
            self._taken = ("", {})
            del parts  # freed before the next are made
            with naming(self.path):
                parts = read_packed(self._places[f"{path}.weight"], scheme, self._dtype)
            self._taken = (path, parts)
        return parts.pop(part)

    def write_tokenizer(self, out: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json (with the chat template) and
        generation_config.json, and tokenizer.model for a sentencepiece vocabulary, into ``out``."""
        with naming(self.path):
            tokenizer.write(self._meta, Path(out), self.config["max_position_embeddings"])


def find_model(
    entry: Architecture, keys: Keys, meta: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Place]]:
    """config.json, and where each parameter of its model lies.

    Raises:
        ModelError: metadata and tensors are no model that is computed.
    """
    tokenizer.check(meta)
    check_layers(tensors, keys.size("block_count"), entry.model_type)
    config = model_config(entry, keys, tensors, _vocab_size(meta, keys, tensors))
    _check_width(config["hidden_size"], tensors)
    vectors = _rope_vectors(keys, config, tensors)
    if scaling := rope.rope_scaling(keys, config, vectors):
        yarn = entry.yarn if scaling.get("rope_type") == "yarn" else {}
        config["rope_scaling"] = scaling | yarn
    keys.refuse_rest(entry.implied)
    config = settle(config | tokenizer.config_ids(meta))
    places = find_places(
        _build(config),
        tensors,
        keys.arch,
        config,
        permuted=entry.permuted,
        norm_offset=entry.norm_offset,
    )
    return config, places


def _vocab_size(meta: dict[str, Any], keys: Keys, tensors: dict[str, Tensor]) -> int:
    """Rows of the embedding, which must be the tokens' number or the one in the metadata."""
    tokens = len(meta["tokenizer.ggml.tokens"])
    stated = keys.size("vocab_size", tokens)
    rows = tensors["token_embd.weight"].rows if "token_embd.weight" in tensors else stated
    if rows < tokens or rows not in (tokens, stated):
        raise ModelError(
            f"token_embd.weight has {rows} rows; expected one for each of {tokens} tokens "
            f"({keys.arch}.vocab_size: {stated})"
        )
    return rows


def _check_width(hidden: int, tensors: dict[str, Tensor]) -> None:
    """Raises ModelError for a width that the file does not have, before a model of it is made."""
    embedding = tensors.get("token_embd.weight")
    if embedding and embedding.shape[-1] != hidden:
        raise ModelError(
            "shapes that contradict the metadata or the type: token_embd.weight "
            f"{embedding.shape}, expected rows of {hidden}"
        )


def _rope_vectors(
    keys: Keys, config: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, np.ndarray]:
    """The factors of rope that the file has as tensors, by name."""
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    expected = (keys.size("rope.dimension_count", size) // 2,)
    found = {name: tensors[name] for name in rope.TENSORS if name in tensors}
    for name, tensor in found.items():
        if tensor.shape != expected:
            raise ModelError(
                "shapes that contradict the metadata or the type: "
                f"{name} {tensor.shape}, expected {expected}"
            )
    return {name: read_vector(tensor) for name, tensor in found.items()}


def _build(config: dict[str, Any]) -> nn.Module:
    """mlx-lm's model of a config, its weights never evaluated."""
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": mx.zeros(1)}
    try:
        model = make_model(config)
        if hasattr(model, "sanitize"):
            model.sanitize(head)  # where some models tie their head
    except FlashError:
        raise
    except Exception as error:  # the config drives foreign code, which may fail in any way
        raise ModelError(
            f"the metadata make no {config['model_type']} model: {type(error).__name__}: {error}"
        ) from error
    return model


def _schemes(places: dict[str, Place]) -> dict[str, SourceScheme]:
    """Path, without ``.weight``, of each matrix that stays quantised; the rest become floats."""
    found = {
        name.removesuffix(".weight"): source_scheme(place.tensor.type)
        for name, place in places.items()
        if place.matrix and len(place.shape) == len(place.tensor.shape)
    }
    return {path: scheme for path, scheme in found.items() if scheme}


def _requantised(
    places: dict[str, Place], schemes: dict[str, SourceScheme]
) -> dict[str, tuple[int, int, int]]:
    """See ``CheckpointFacts``."""
    found: dict[str, tuple[int, int, int]] = {}
    for path, scheme in schemes.items():
        if scheme.requantised:
            kind = places[f"{path}.weight"].tensor.type.name
            found[kind] = (found.get(kind, (0,))[0] + 1, scheme.bits, scheme.group)
    return found


def _quantisation(schemes: dict[str, SourceScheme]) -> dict[str, Any]:
    """mlx-lm's dict: the scheme that most matrices have, and by path the others."""
    configs = {path: scheme.to_config() for path, scheme in schemes.items()}
    counts = Counter(json.dumps(config) for config in configs.values())
    most = json.loads(counts.most_common(1)[0][0])
    return most | {path: config for path, config in configs.items() if config != most}


def _default_dtype(tensors: list[Tensor], quantised: bool, wide: bool) -> str:
    kinds = {t.type.name for t in tensors}
    if wide and kinds != {"F32"}:
        return "bfloat16"
    if quantised:
        return "float16"
    if kinds - {"F32", "F16"}:
        return "bfloat16"
    return "float16" if "F16" in kinds else "float32"
