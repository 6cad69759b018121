"""MIL operations in numpy: computed in float32, rounded to the type that the program says.

That is what fp16 hardware with wide accumulators does, and numbers that fp16 cannot hold become
infinite here as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Args = dict[str, Any]
Kernel = Callable[[Args], Any]


def _float(x: Any) -> Any:
    x = np.asarray(x)
    return x.astype(np.float32) if x.dtype == np.float16 else x


def _binary(function: Callable[[Any, Any], Any]) -> Kernel:
    return lambda a: function(_float(a["x"]), _float(a["y"]))


def _unary(function: Callable[[Any], Any]) -> Kernel:
    return lambda a: function(_float(a["x"]))


def _reduce(function: Callable[..., Any]) -> Kernel:
    def run(a: Args) -> Any:
        axes = (
            tuple(int(i) for i in np.atleast_1d(a["axes"])) if a.get("axes") is not None else None
        )
        return function(_float(a["x"]), axis=axes, keepdims=bool(a.get("keep_dims", False)))

    return run


def _linear(a: Args) -> Any:
    y = _float(a["x"]) @ _float(a["weight"]).T
    return y if a.get("bias") is None else y + _float(a["bias"])


def _matmul(a: Args) -> Any:
    x, y = _float(a["x"]), _float(a["y"])
    if a.get("transpose_x"):
        x = x.swapaxes(-1, -2)
    if a.get("transpose_y"):
        y = y.swapaxes(-1, -2)
    return x @ y


def _softmax(a: Args) -> Any:
    x = _float(a["x"])
    axis = int(a["axis"])
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


_erf = np.vectorize(math.erf, otypes=[np.float32])


def _gelu(a: Args) -> Any:
    x = _float(a["x"])
    if a["mode"] == "EXACT":
        return 0.5 * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return 0.5 * x * (1 + np.tanh(inner))


def _sigmoid(x: Any) -> Any:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _gather(a: Args) -> Any:
    x, at, axis = np.asarray(a["x"]), np.asarray(a["indices"]), int(a.get("axis", 0))
    if at.size and (at.min() < -x.shape[axis] or at.max() >= x.shape[axis]):
        raise IndexError(f"gather of {at.min()} to {at.max()} from {x.shape[axis]}")
    return np.take(x, at, axis=axis)


def _range(a: Args) -> tuple[slice, ...]:
    """The slices of begin, end, masks."""
    x = np.asarray(a["x"])
    begin, end = np.asarray(a["begin"]).tolist(), np.asarray(a["end"]).tolist()
    stride = np.asarray(a["stride"]).tolist() if a.get("stride") is not None else [1] * x.ndim

    def mask(name: str) -> list[bool]:
        found = a.get(name)
        return [False] * x.ndim if found is None else [bool(f) for f in found]

    open_begin, open_end, squeezed = mask("begin_mask"), mask("end_mask"), mask("squeeze_mask")
    slices: list[Any] = []
    for i in range(x.ndim):
        if squeezed[i]:
            slices.append(begin[i])
            continue
        slices.append(
            slice(None if open_begin[i] else begin[i], None if open_end[i] else end[i], stride[i])
        )
    return tuple(slices)


def _slice_update(a: Args) -> Any:
    x, update = np.asarray(a["x"]), np.asarray(a["update"])
    at = _range(a)
    room = x[at].shape
    if room != update.shape:
        raise IndexError(f"slice_update of {update.shape} into {room}: out of the state")
    whole = x.copy()
    whole[at] = update
    return whole


def _scatter(a: Args) -> Any:
    data, at = np.asarray(a["data"]).copy(), np.asarray(a["indices"])
    if int(a.get("axis", 0)) != 0 or a.get("mode", "add") != "update":
        raise NotImplementedError("scatter other than mode update along axis 0")
    if at.size and (at.min() < 0 or at.max() >= len(data)):
        raise IndexError(f"scatter to {at.min()} to {at.max()} of {len(data)}")
    data[at] = a["updates"]
    return data


def _split(a: Args) -> list[Any]:
    x = np.asarray(a["x"])
    sizes = a.get("split_sizes")
    axis = int(a["axis"])
    if sizes is None:
        return np.split(x, int(a["num_splits"]), axis=axis)
    return np.split(x, np.cumsum(sizes)[:-1], axis=axis)


def _cast(a: Args) -> Any:
    kinds = {"fp16": np.float16, "fp32": np.float32, "int32": np.int32, "bool": np.bool_}
    return np.asarray(a["x"]).astype(kinds[str(a["dtype"])])


def shift_scale(a: Args) -> Any:
    """``constexpr_blockwise_shift_scale``, on its own: scale * (data - offset), block by block."""
    data, scale = np.asarray(a["data"]), np.asarray(a["scale"], np.float32)
    shape: list[int] = []
    for whole, blocks in zip(data.shape, scale.shape, strict=True):
        shape += [blocks, whole // blocks]
    apart = data.astype(np.float32).reshape(shape)
    spread = [n for blocks in scale.shape for n in (blocks, 1)]
    if a.get("offset") is not None:
        apart = apart - np.asarray(a["offset"]).astype(np.float32).reshape(spread)
    return (apart * scale.reshape(spread)).reshape(data.shape)


def lut_to_dense(a: Args) -> Any:
    """``constexpr_lut_to_dense`` of scalars: each index is looked up in its group's table."""
    indices, lut = np.asarray(a["indices"]), np.asarray(a["lut"])
    if lut.shape[-1] != 1:
        raise NotImplementedError("palettes of vectors")
    groups = [
        np.arange(n) // (n // blocks)
        for n, blocks in zip(indices.shape, lut.shape[:-2], strict=True)
    ]
    return lut[(*np.ix_(*groups), indices.astype(np.int64), 0)]


KERNELS: dict[str, Kernel] = {
    "abs": _unary(np.abs),
    "add": _binary(np.add),
    "cast": _cast,
    "concat": lambda a: np.concatenate([np.asarray(v) for v in a["values"]], axis=int(a["axis"])),
    "constexpr_blockwise_shift_scale": shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
    "expand_dims": lambda a: np.expand_dims(np.asarray(a["x"]), tuple(np.atleast_1d(a["axes"]))),
    "gather": _gather,
    "gelu": _gelu,
    "greater": _binary(np.greater),
    "greater_equal": _binary(np.greater_equal),
    "identity": lambda a: a["x"],
    "linear": _linear,
    "logical_and": lambda a: np.logical_and(a["x"], a["y"]),
    "matmul": _matmul,
    "maximum": _binary(np.maximum),
    "minimum": _binary(np.minimum),
    "mul": _binary(np.multiply),
    "real_div": _binary(np.divide),
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean),
    "reduce_sum": _reduce(np.sum),
    "relu": _unary(lambda x: np.maximum(x, 0)),
    "reshape": lambda a: np.reshape(a["x"], [int(n) for n in np.asarray(a["shape"])]),
    "rsqrt": lambda a: 1 / np.sqrt(_float(a["x"]) + np.float32(a["epsilon"])),
    "scatter": _scatter,
    "select": lambda a: np.where(a["cond"], a["a"], a["b"]),
    "sigmoid": _unary(_sigmoid),
    "silu": _unary(lambda x: x * _sigmoid(x)),
    "slice_by_index": lambda a: np.asarray(a["x"])[_range(a)],
    "slice_update": _slice_update,
    "softmax": _softmax,
    "split": _split,
    "sqrt": _unary(np.sqrt),
    "square": _unary(np.square),
    "squeeze": lambda a: np.squeeze(np.asarray(a["x"]), tuple(np.atleast_1d(a["axes"]))),
    "sub": _binary(np.subtract),
    "tanh": _unary(np.tanh),
    "transpose": lambda a: np.transpose(a["x"], [int(n) for n in a["perm"]]),
}
