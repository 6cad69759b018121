"""Low-rank deltas that make another model of a checkpoint while it is converted.

An adapter is one safetensors file. For a projection P of the base model, [out, in], it holds

    P.lora_a   int8 [rank, in]      P.lora_b   int8 [out, rank]
    P.scale    float32 [rank]       P.factor   float32 [], optional

and the new weight is ``(W + lora_b * scale @ lora_a) * factor`` (LoRA, arXiv 2106.09685, A and B
rounded to int8 with one scale a rank). For a norm N it holds ``N.delta`` float16 [d]. A projection
Q that the base does not have is ``Q.codes`` int8 [out, in] times ``Q.row_scale`` float32 [out].
``P.sample``, float16, are base weights at even distances, by which a wrong base is noticed.
Metadata: format, version, ``config`` (what changes in config.json), ``base`` (what config.json must
say), ``card`` (a few words for people).

All arithmetic is in float32. Adapters are trained by ``training/relufy``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flash.common.files import sha256_of
from mlx_flash.common.json_reader import entry, fields, parse_json
from mlx_flash.errors import DamagedError, ModelError
from mlx_flash.storage.safetensors_header import check_file

FORMAT, VERSION = "mlx-flash-adapter", "1"
SHIPPED = Path(__file__).with_name("data")
SAMPLES = 64
# Relative distance of a base's samples. 4-bit quantisation makes 0.1, another model about 1.4.
MAX_DISTANCE = 0.3
PARTS = ("lora_a", "lora_b", "scale", "factor", "delta", "sample", "codes", "row_scale")


def shipped_adapters() -> list[str]:
    """Names of the adapters that come with this package."""
    return sorted(file.stem for file in SHIPPED.glob("*.safetensors"))


def sample(weight: mx.array) -> mx.array:
    """``SAMPLES`` numbers at even distances, float16."""
    flat = weight.reshape(-1)
    step = max(1, flat.size // SAMPLES)
    return flat[: step * SAMPLES : step].astype(mx.float16)


@dataclass(frozen=True)
class Adapter:
    """One adapter, in memory.

    Args:
        path: the file.
        sha256: of the file.
        config: keys of config.json to set.
        base: keys of config.json and what the base model has there.
        tensors: base tensor without ``.weight`` -> part -> array.
    """

    path: Path
    sha256: str
    config: dict[str, Any]
    base: dict[str, Any]
    tensors: dict[str, dict[str, mx.array]]

    @classmethod
    def open(cls, source: str | Path) -> Adapter:
        """An adapter that ships with this package, by its name, or a file.

        Raises:
            ModelError: no such adapter exists, or the file is not an adapter of this version.
            DamagedError: the file cannot be read or a part is missing or of a wrong shape.
        """
        path = Path(source)
        if str(source) in shipped_adapters():
            path = SHIPPED / f"{source}.safetensors"
        if not path.is_file():
            raise ModelError(
                f"no such adapter: {str(source)!r} is neither a file nor one of those that ship "
                f"with this package ({', '.join(shipped_adapters()) or 'none'})"
            )
        try:
            check_file(path)
            found, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise DamagedError(f"{path} cannot be read as safetensors: {error}") from error
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise ModelError(
                f"{path} says format {metadata.get('format')!r}, version "
                f"{metadata.get('version')!r}; expected {FORMAT!r}, version {VERSION!r}"
            )
        try:
            config, base = (
                fields(parse_json(entry(metadata, key)), key) for key in ("config", "base")
            )
        except ValueError as error:
            raise DamagedError(f"{path}: its metadata lacks config or base: {error}") from error
        tensors: dict[str, dict[str, mx.array]] = {}
        for name, array in found.items():
            target, _, part = name.rpartition(".")
            if part not in PARTS or not target:
                raise ModelError(f"{path}: unknown tensor {name}; expected P.lora_a and the like")
            tensors.setdefault(target, {})[part] = array
        adapter = cls(path, sha256_of(path), config, base, tensors)
        adapter._check()
        return adapter

    def _check(self) -> None:
        for name, parts in self.tensors.items():
            for needed in ({"lora_a", "lora_b", "scale"}, {"codes", "row_scale"}):
                there = needed & parts.keys()
                if there and there != needed:
                    lacking = ", ".join(sorted(needed - there))
                    raise DamagedError(f"{self.path}: {name} lacks {lacking}")
            if "codes" in parts and parts["row_scale"].shape != parts["codes"].shape[:1]:
                raise DamagedError(
                    f"{self.path}: {name} has codes {tuple(parts['codes'].shape)} and "
                    f"{parts['row_scale'].size} scales; expected one for each of its rows"
                )
            if "lora_a" in parts:
                ranks = {parts["lora_a"].shape[0], parts["lora_b"].shape[-1], parts["scale"].size}
                if len(ranks) != 1:
                    raise DamagedError(
                        f"{self.path}: {name} has ranks {sorted(ranks)}; expected one"
                    )

    @property
    def added(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor that the base does not have, by its name (``Q.weight``)."""
        return {
            f"{name}.weight": tuple(parts["codes"].shape)
            for name, parts in self.tensors.items()
            if "codes" in parts
        }

    def adapted_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the new model.

        Raises:
            ModelError: the config is not that of the adapter's base.
        """
        wrong = [
            f"{key} is {config.get(key)!r}, expected {value!r}"
            for key, value in self.base.items()
            if config.get(key) != value
        ]
        if wrong:
            raise ModelError(f"adapter {self.path.stem} is not for this model: {'; '.join(wrong)}")
        return config | self.config

    def check_names(self, names: Collection[str]) -> None:
        """Raise ModelError if it would change a tensor that is not there, or add one that is."""
        if there := sorted(self.added.keys() & set(names)):
            raise ModelError(
                f"adapter {self.path.stem} is not for this model, which has {there[0]} already"
            )
        changed = {f"{name}.weight" for name in self.tensors} - self.added.keys()
        lost = sorted(name.removesuffix(".weight") for name in changed - set(names))
        if lost:
            raise ModelError(
                f"adapter {self.path.stem} is not for this model, which lacks "
                f"{len(lost)} of {len(self.tensors)} tensors: {', '.join(lost[:5])}"
            )

    def adapt(self, name: str, weight: mx.array | None, dtype: mx.Dtype) -> mx.array:
        """A tensor of the adapted model, lazy.

        Args:
            name: such as ``P.weight``.
            weight: the base's tensor of this name; None where the adapter adds one.
            dtype: of a tensor that is added; others keep the base's.

        Raises:
            ModelError: the weight has another shape than the adapter's, or is not its base's.
        """
        parts = self.tensors.get(name.removesuffix(".weight"))
        if weight is None:
            return (parts["codes"].astype(mx.float32) * parts["row_scale"][:, None]).astype(dtype)
        if parts is None or not name.endswith(".weight"):
            return weight
        new = weight.astype(mx.float32)
        self._check_base(name, new, parts)
        if "lora_a" in parts:
            b = parts["lora_b"].astype(mx.float32) * parts["scale"]
            new = new + b @ parts["lora_a"].astype(mx.float32)
        if "delta" in parts:
            new = new + parts["delta"].astype(mx.float32)
        if "factor" in parts:
            new = new * parts["factor"]
        return new.astype(weight.dtype)

    def adapt_all(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """All tensors of the adapted model; those that are added get the type of most floats.

        Raises:
            ModelError: see ``check_names`` and ``adapt``.
        """
        self.check_names(weights)
        types = Counter(w.dtype for w in weights.values() if mx.issubdtype(w.dtype, mx.floating))
        dtype = types.most_common(1)[0][0] if types else mx.float32
        names = [*weights, *self.added]
        return {name: self.adapt(name, weights.get(name), dtype) for name in names}

    def _check_base(self, name: str, weight: mx.array, parts: dict[str, mx.array]) -> None:
        shape = weight.shape
        if "lora_a" in parts:
            shape = (parts["lora_b"].shape[0], parts["lora_a"].shape[1])
        elif "delta" in parts:
            shape = parts["delta"].shape
        if tuple(weight.shape) != tuple(shape):
            raise ModelError(
                f"adapter {self.path.stem} is not for this model: {name} is {tuple(weight.shape)}, "
                f"expected {tuple(shape)}"
            )
        if "sample" in parts:
            expected = parts["sample"].astype(mx.float32)
            missed = sample(weight).astype(mx.float32) - expected
            distance = (mx.linalg.norm(missed) / mx.linalg.norm(expected)).item()
            if not distance <= MAX_DISTANCE:
                raise ModelError(
                    f"adapter {self.path.stem} is not for these weights: {name} differs from its "
                    f"base by {distance:.0%} of its size, expected at most {MAX_DISTANCE:.0%}"
                )
