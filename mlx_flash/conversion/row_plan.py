"""What a row is made of: which tensors of a checkpoint, how laid out, how cut into rows.

Three units. A neuron's row has a row of gate and up and a column of down (LLM in a flash, section
3.2), each with the scales of its own where it is quantised. An expert's row has all its matrices.
A layer's row is a whole FFN: quantised tensors whose scales belong to many neurons stay as they
are, and so do mlx-lm's kernels for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_flash.errors import ModelError
from mlx_flash.models.dtypes import BIT_VIEWS, DTYPE_NAMES, DTYPES, FLOAT_NAMES
from mlx_flash.models.families import projections, weight_shapes
from mlx_flash.models.mixtures import check_counts
from mlx_flash.models.quantized_rows import SUFFIXES, QuantScheme
from mlx_flash.storage.row_layout import RowLayout

from .checkpoint import Checkpoint
from .model_spec import ModelSpec

BLOCK_BYTES = 16 << 20


@dataclass
class RowPlan:
    """How a checkpoint's FFNs become rows.

    Args:
        unit: neuron, expert or layer.
        activation: name of the FFN's activation.
        names: of each layer, part of a row -> name of the tensor that holds it.
        rows: of each layer.
        layouts: of each layer.
        dtype: float type that the model computes in, a safetensors name.
        row_scheme: how the numbers of a neuron's row are quantised; None for floats and for the
            other units.
        fused: gate and up come in one tensor.
    """

    unit: str
    activation: str
    names: list[dict[str, str]]
    rows: list[int]
    layouts: list[RowLayout]
    dtype: str
    row_scheme: QuantScheme | None = None
    fused: bool = False

    @property
    def tensors(self) -> set[str]:
        """Names of all tensors that go into rows."""
        return {name for names in self.names for name in names.values()}

    def blocks(self, layer: int, take: Callable[[str], mx.array]) -> Iterator[np.ndarray]:
        """The rows of a layer as uint8 blocks [n, stride]; ``take`` gives a tensor by its name."""
        names, layout = self.names[layer], self.layouts[layer]
        taken = {name: raw(take(name)) for name in dict.fromkeys(names.values())}
        arrays = {part: taken[name] for part, name in names.items()}
        if self.unit == "neuron":
            cut = self._neurons(arrays)
        elif self.unit == "expert":
            cut = lambda start, stop: [array[start:stop] for array in arrays.values()]  # noqa: E731
        else:
            cut = lambda start, stop: [array[None] for array in arrays.values()]  # noqa: E731
        rows, step = self.rows[layer], max(1, BLOCK_BYTES // layout.stride)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            block = np.zeros((stop - start, layout.stride), np.uint8)
            layout.pack([_bytes(part, stop - start) for part in cut(start, stop)], block)
            yield block

    def _neurons(self, arrays: dict[str, np.ndarray]) -> Callable[[int, int], list[np.ndarray]]:
        rows = arrays["down"].shape[1]
        if self.fused:
            arrays["gate"], arrays["up"] = arrays["gate"][:rows], arrays["up"][rows:]

        def cut(start: int, stop: int) -> list[np.ndarray]:
            parts = []
            for part, array in arrays.items():
                if part != "down":
                    parts.append(array[start:stop])
                    continue
                column = np.ascontiguousarray(array[:, start:stop].T)
                if self.row_scheme is None:
                    parts.append(column)
                else:
                    found = self.row_scheme.quantize(mx.array(column).view(DTYPES[self.dtype]))
                    parts += [raw(array) for array in found]
            return parts

        return cut


def choose_unit(spec: ModelSpec, row_scheme: QuantScheme | None, names: Collection[str]) -> str:
    """What one row holds: an expert, a neuron, or a layer's whole FFN.

    A neuron can be read alone where its numbers are floats, or where its row has scales of its own.
    Everywhere else a scale belongs to many neurons, and their matrices stay whole.

    Args:
        row_scheme: see ``CheckpointFacts``.
        names: of all tensors; quantised ones have scales beside them.
    """
    if spec.ffn is None:
        return "expert"
    scales = {
        f"{path}.{name}.scales" for path in spec.modules for name in projections(spec.ffn).values()
    }
    return "layer" if not row_scheme and scales & set(names) else "neuron"


def plan_rows(checkpoint: Checkpoint) -> RowPlan:
    """How the FFNs of a checkpoint become rows.

    Raises:
        ModelError: the shapes or types of tensors do not fit together.
    """
    names = checkpoint.shapes.keys()
    unit = choose_unit(checkpoint.spec, checkpoint.facts.row_scheme, names)
    return {"neuron": _neurons, "expert": _experts, "layer": _layers}[unit](checkpoint)


def _neurons(checkpoint: Checkpoint) -> RowPlan:
    """A row a neuron; with a row scheme gate and up are quantised already, down when it is cut."""
    ffn, scheme = checkpoint.spec.ffn, checkpoint.facts.row_scheme
    names, rows = [], []
    for path in checkpoint.spec.modules:
        own: dict[str, str] = {}
        weights = {part: f"{path}.{name}.weight" for part, name in projections(ffn).items()}
        d_model, count = checkpoint.shapes[weights["down"]]
        for part, name in weights.items():
            own[part] = name
            if scheme and part != "down":
                own |= {f"{part}.{s}": name.removesuffix("weight") + s for s in scheme.suffixes}
        _check_shapes(checkpoint, path, count, d_model)
        names.append(own)
        rows.append(count)
    floats = ["down"]
    if scheme and scheme.mode == "affine":
        floats += ["gate.scales", "up.scales"]
    dtype = _one_type(checkpoint, [own[part] for own in names for part in floats if part in own])
    if scheme is None:
        _one_type(checkpoint, [name for own in names for name in own.values()])
        layout = RowLayout.plan(ffn.parts, dtype, d_model)
    else:
        parts: list[tuple[str, str, tuple[int, ...]]] = []
        for part in ffn.parts:
            parts.append((part, "U32", (scheme.words(d_model),)))
            groups = (d_model // scheme.group_size,)
            parts += [(f"{part}.{s}", scheme.scale_type(dtype), groups) for s in scheme.suffixes]
        layout = RowLayout.of(parts, pad=False)  # matmuls want packed rows without gaps
    layouts = [layout] * len(rows)
    fused = bool(ffn.fused)
    return RowPlan("neuron", ffn.activation, names, rows, layouts, dtype, scheme, fused)


def _check_shapes(checkpoint: Checkpoint, path: str, rows: int, d_model: int) -> None:
    ffn, scheme = checkpoint.spec.ffn, checkpoint.facts.row_scheme
    for name, expected in weight_shapes(ffn, rows, d_model).items():
        found = checkpoint.shapes[f"{path}.{name}.weight"]
        if scheme and name != ffn.down:
            expected = (expected[0], scheme.words(d_model))
        if found != expected:
            raise ModelError(
                f"{path}.{name}.weight has shape {found}, expected {expected} "
                f"beside {path}.{ffn.down}.weight"
            )


def _layers(checkpoint: Checkpoint) -> RowPlan:
    """A row a layer: every matrix of its FFN with its scales; biases stay resident."""
    ffn, names = checkpoint.spec.ffn, []
    for path in checkpoint.spec.modules:
        own = {}
        for projection in dict.fromkeys(projections(ffn).values()):
            for suffix in ("weight", *SUFFIXES):
                if (name := f"{path}.{projection}.{suffix}") in checkpoint.shapes:
                    own[f"{projection}.{suffix}"] = name
        names.append(own)
    layouts = [_whole(checkpoint, own, 0) for own in names]
    return RowPlan(
        "layer", ffn.activation, names, [1] * len(names), _aligned(layouts), _float_of(checkpoint)
    )


def _experts(checkpoint: Checkpoint) -> RowPlan:
    """A row an expert: every tensor of its module that has an entry for each expert."""
    mixture, names, rows = checkpoint.spec.mixture, [], []
    check_counts(checkpoint.config, mixture, checkpoint.spec.modules)
    for path, count in checkpoint.spec.modules.items():
        own = {}
        for name in sorted(checkpoint.shapes):
            part = name.removeprefix(path + ".")
            if part != name and part.split(".")[0] in mixture.projections:
                own[part] = name
        odd = [name for name in own.values() if checkpoint.shapes[name][:1] != (count,)]
        if odd or not own:
            raise ModelError(
                f"tensors of {path} without an entry for each of {count} experts: "
                f"{', '.join(odd) or 'all'}"
            )
        names.append(own)
        rows.append(count)
    layouts = [_whole(checkpoint, own, 1) for own in names]
    return RowPlan("expert", "", names, rows, _aligned(layouts), _float_of(checkpoint))


def _whole(checkpoint: Checkpoint, names: dict[str, str], skip: int) -> RowLayout:
    """A layout of whole tensors, without their first ``skip`` axes."""
    if single := [name for name in names.values() if len(checkpoint.shapes[name]) <= skip]:
        raise ModelError(f"tensors of one number an expert are not read: {', '.join(single)}")
    return RowLayout.of(
        [
            (part, DTYPE_NAMES[checkpoint.dtypes[name]], tuple(checkpoint.shapes[name][skip:]))
            for part, name in names.items()
        ]
    )


def _aligned(layouts: list[RowLayout]) -> list[RowLayout]:
    """The same with one alignment, the smallest."""
    least = min(layout.alignment for layout in layouts)
    return [
        RowLayout.of([(p.name, p.dtype, p.shape) for p in layout.parts], least)
        for layout in layouts
    ]


def _one_type(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    types = {DTYPE_NAMES[checkpoint.dtypes[name]] for name in names}
    if len(types) != 1:
        raise ModelError(
            f"FFN weights are of several types ({', '.join(sorted(types))}); "
            "choose one with --dtype"
        )
    return types.pop()


def _float_of(checkpoint: Checkpoint) -> str:
    """The float type of most of a checkpoint's tensors: what it computes in."""
    codes = [DTYPE_NAMES[dtype] for dtype in checkpoint.dtypes.values()]
    return max(FLOAT_NAMES, key=codes.count)


def raw(array: mx.array) -> np.ndarray:
    """The bits of an array as unsigned integers (numpy has no bfloat16); no copy."""
    bits = array.view(BIT_VIEWS[array.dtype.size])
    mx.eval(bits)
    return np.array(bits, copy=False)


def _bytes(array: np.ndarray, rows: int) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8).reshape(rows, -1)
