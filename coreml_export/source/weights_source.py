"""Where weights come from: a model directory, a Hugging Face directory, or a GGUF file.

Tensors are read one at a time, under mlx-lm's names, as float32; quantised ones as the numbers that
they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.common.json_reader import fields, read_json
from mlx_flash.conversion.checkpoint import RequestedFormat
from mlx_flash.conversion.open_checkpoint import open_checkpoint
from mlx_flash.errors import DamagedError, ModelError
from mlx_flash.model_directory.config import read_config
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.model_directory.links import check_link
from mlx_flash.model_directory.writing import CALIBRATION
from mlx_flash.models import families
from mlx_flash.models.quantized_rows import QuantScheme, rows_of, scheme_from
from mlx_flash.models.registry import make_model
from mlx_flash.paging.row_weights import read_layer


class Source:
    """One model's config, its mlx-lm model (random, never evaluated) and its tensors.

    Args:
        path: what the user named.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._directory = _model_directory(self.path)
        if self._directory:
            if self._directory.mixture:
                raise ModelError(f"{path} is a mixture of experts; only dense models are exported")
            self.config = dict(self._directory.config)
            self._tensors: Any = _DirectoryTensors(self._directory)
        else:
            self._tensors = _CheckpointTensors(self.path)
            self.config = self._tensors.config
        self.names = frozenset(self._tensors.shapes)
        self.shapes: dict[str, tuple[int, ...]] = self._tensors.shapes
        self.model = self._settled()

    @property
    def directory(self) -> ModelDirectory | None:
        """The model directory, where it is one: it may hold predictors."""
        return self._directory

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def take(self, name: str) -> np.ndarray:
        """One tensor as float32, read now."""
        array = self._tensors.take(name).astype(mx.float32)
        try:
            mx.eval(array)
        except RuntimeError as error:
            raise DamagedError(
                f"tensor {name} of {self.path} cannot be read: {error}; get the model again"
            ) from error
        return np.array(array, copy=False)

    def write_tokenizer(self, out: Path) -> None:
        """Put tokenizer files, licence and card into a directory."""
        self._tensors.write_tokenizer(out)

    def reference(self, replaced: dict[str, np.ndarray] | None = None) -> Any:
        """The mlx-lm model in float32 with every weight in memory.

        Args:
            replaced: tensors that take the place of the source's, such as dequantised ones.
        """
        model = self._settled()
        weights = {}
        for name in sorted(self.names):
            given = (replaced or {}).get(name)
            weights[name] = mx.array(self.take(name) if given is None else given)
            mx.eval(weights[name])
        model.load_weights(list(weights.items()), strict=True)
        return model

    def prepared(self, missing: set[str]) -> Any:
        """The mlx-lm model in float32 but for some weights, which must not be asked for."""
        model = self._settled()
        weights = []
        for name in sorted(self.names - missing):
            weights.append((name, mx.array(self.take(name))))
            mx.eval(weights[-1][1])
        model.load_weights(weights, strict=False)
        return model

    def _settled(self) -> Any:
        """A model whose head is tied or not as the tensors say."""
        model = make_model(self.config)
        if hasattr(model, "sanitize"):
            # It may tie the head where that equals the embedding; a head listed here does not.
            model.sanitize(
                {
                    name: mx.ones(shape) if name == "lm_head.weight" else mx.zeros(shape)
                    for name, shape in self.shapes.items()
                }
            )
        return model


def _model_directory(path: Path) -> ModelDirectory | None:
    if path.is_dir() and isinstance(read_config(path).get("flash"), dict):
        return ModelDirectory(path)
    return None


class _CheckpointTensors:
    """A checkpoint's tensors, each as often as asked for; a checkpoint itself gives each once.

    The last one is kept, since it is often asked for in several pieces.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checkpoint = open_checkpoint(path, RequestedFormat(dequantize=True))
        self.config = self._checkpoint.config
        self.shapes = dict(self._checkpoint.shapes)
        self._taken: set[str] = set()
        self._last: tuple[str, mx.array] | None = None

    def take(self, name: str) -> mx.array:
        if self._last and self._last[0] == name:
            return self._last[1]
        self._last = None  # freed before the next is read
        if name in self._taken:
            self._checkpoint = open_checkpoint(self._path, RequestedFormat(dequantize=True))
            self._taken.clear()
        self._taken.add(name)
        self._last = (name, self._checkpoint.take(name))
        return self._last[1]

    def write_tokenizer(self, out: Path) -> None:
        self._checkpoint.write_tokenizer(out)


class _DirectoryTensors:
    """Resident weights and rows of a model directory under the names of a plain checkpoint."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory
        self._resident: dict[str, mx.array] = {}
        self._shard_of: dict[str, Path] = {}
        for shard in directory.shards:
            found = _load(shard)
            self._resident.update(found)  # for shapes only: what is evaluated would stay
            self._shard_of.update(dict.fromkeys(found, shard))
        self._default = directory.config.get("quantization")
        model = make_model(directory.config)
        ffn = directory.ffn
        self._places = {
            f"{path}.{name}.weight": (layer, part, name)
            for layer, (path, _) in enumerate(families.modules(model, ffn))
            for part, name in families.projections(ffn).items()
        }
        self._layer: tuple[int, dict[str, mx.array]] | None = None
        self.shapes = {name: tuple(shape) for name, shape in self._all_shapes(model)}

    def _all_shapes(self, model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, array in self._resident.items():
            base, _, last = name.rpartition(".")
            if last in ("scales", "biases") and f"{base}.weight" in self._resident:
                continue
            scheme = self._scheme(base) if f"{base}.scales" in self._resident else None
            if scheme and last == "weight":
                yield name, (*array.shape[:-1], array.shape[-1] * 32 // scheme.bits)
            else:
                yield name, tuple(array.shape)
        d_model = self._directory.d_model
        for name, (layer, _, _) in self._places.items():
            yield name, tuple(self._projection_shape(name, layer, d_model))

    def _projection_shape(self, name: str, layer: int, d_model: int) -> tuple[int, int]:
        layout = self._directory.rows.layers[layer]
        if self._directory.unit == "neuron":
            rows = layout.rows
        else:
            ffn = self._directory.ffn
            up = f"{ffn.fused or ffn.up}.weight"
            rows = next(p.shape[0] for p in layout.layout.parts if p.name == up)
            rows = rows // 2 if ffn.fused else rows
        shapes = families.weight_shapes(self._directory.ffn, rows, d_model)
        return shapes[self._places[name][2]]

    def _scheme(self, base: str) -> QuantScheme:
        own = self._default.get(base) if self._default else None
        return scheme_from(own if isinstance(own, dict) else self._default)

    def take(self, name: str) -> mx.array:
        if name in self._places:
            return self._projection(*self._places[name])
        base = name.rpartition(".")[0]
        fresh = _load(self._shard_of[name])
        if name.endswith(".weight") and f"{base}.scales" in self._resident:
            return _floats(fresh, base, self._scheme(base))
        return fresh[name]

    def _projection(self, layer: int, part: str, name: str) -> mx.array:
        arrays = self._rows(layer)
        directory = self._directory
        if directory.unit == "neuron":
            if directory.ffn.fused and part != "down":
                halves = [arrays[key] for key in ("gate", "up")]
                return mx.concatenate(halves)
            rows = rows_of(arrays, part, directory.scheme)
            floats = rows.floats(mx.float32) if directory.scheme else rows
            return floats.T if part == "down" else floats
        path = next(k for k, v in self._places.items() if v[0] == layer and v[2] == name)
        return _floats(arrays, name, self._scheme(path.removesuffix(".weight")))

    def _rows(self, layer: int) -> dict[str, mx.array]:
        """A layer's rows by part; the last layer asked for is kept."""
        if self._layer is None or self._layer[0] != layer:
            self._layer = None  # freed before the next is read
            arrays = read_layer(self._directory.rows, layer)
            if self._directory.unit != "neuron":  # one row, which is the whole FFN
                arrays = {name: array.squeeze(0) for name, array in arrays.items()}
            self._layer = (layer, arrays)
        return self._layer[1]

    def write_tokenizer(self, out: Path) -> None:
        for file in sorted(self._directory.path.iterdir()):
            foreign = file.suffix == ".safetensors" or file.name in ("config.json", *CALIBRATION)
            if file.is_file() and not foreign:
                check_link(file, self._directory.path)
                (out / file.name).write_bytes(file.read_bytes())


def _load(shard: Path) -> dict[str, mx.array]:
    try:
        return mx.load(str(shard))
    except (RuntimeError, ValueError) as error:
        raise DamagedError(f"{shard} cannot be read: {error}; copy it again") from error


def _floats(arrays: dict[str, mx.array], base: str, scheme: QuantScheme) -> mx.array:
    scales = [arrays[f"{base}.{s}"] for s in scheme.suffixes]
    return mx.dequantize(arrays[f"{base}.weight"], *scales, **scheme.kwargs())


def chat_template(tokenizer: Path) -> str | None:
    """The chat template among the tokenizer files of a directory; None if there is none.

    Of several that have names it is the one that is named default.
    """
    if (tokenizer / "chat_template.jinja").is_file():
        return (tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    file = tokenizer / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        found = fields(read_json(file), "it").get("chat_template")
    except (OSError, ValueError):
        return None
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict)]
        found = next((e.get("template") for e in entries if e.get("name") == "default"), None)
    return found if isinstance(found, str) else None
