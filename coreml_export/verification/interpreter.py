"""Runs a saved package in numpy: the program is read back from the file and walked.

It is a check of the program, not of a device: what Core ML's compilers make of it is not seen here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coreml_export.bundle import mlpackage
from coreml_export.errors import ParityError
from coreml_export.program.coremltools_compat import milproto, types

from .kernels import KERNELS

State = dict[str, np.ndarray]


class Package:
    """A package on disk; functions are read when first called and share their weights."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._model = mlpackage.load(self.path)
        self._spec = self._model.get_spec()
        if not self._spec.HasField("mlProgram"):
            raise ParityError(f"{path} is not a Core ML program")
        self.functions = sorted(self._spec.mlProgram.functions)
        self.metadata = dict(self._spec.description.metadata.userDefined)
        self._loaded: dict[str, Function] = {}
        self._weights: dict[bytes, np.ndarray] = {}

    def function(self, name: str) -> Function:
        """A function, read when first asked for."""
        if name not in self.functions:
            raise ParityError(f"{self.path} has no function {name}; it has {self.functions}")
        if name not in self._loaded:
            spec = type(self._spec)()
            spec.CopyFrom(self._spec)
            for other in self.functions:
                if other != name:
                    del spec.mlProgram.functions[other]
            try:
                program = milproto.load(
                    spec,
                    specification_version=spec.specificationVersion,
                    file_weights_dir=self._model.weights_dir,
                )
            except Exception as error:  # the C++ reader's, the builder's: all mean a bad file
                raise ParityError(f"{self.path}, function {name}: {error}") from error
            self._loaded[name] = Function(name, program.functions[name], self._weights)
        return self._loaded[name]


class Function:
    """One function of a package.

    Attributes:
        inputs: name -> (shape, numpy type), states left out.
        states: name -> shape.
    """

    def __init__(self, name: str, function: Any, weights: dict[bytes, np.ndarray]) -> None:
        self.name = name
        self.inputs: dict[str, tuple[tuple[int, ...], Any]] = {}
        self.states: dict[str, tuple[int, ...]] = {}
        for key, var in function.inputs.items():
            kind = var.sym_type
            if types.is_state(kind):
                self.states[key] = tuple(kind.wrapped_type().get_shape())
            else:
                dtype = types.nptype_from_builtin(kind.get_primitive())
                self.inputs[key] = (tuple(kind.get_shape()), np.dtype(dtype))
        self._outputs = [var.name for var in function.outputs]
        self._constants: dict[str, Any] = {}
        self._steps: list[tuple[Any, Any, list[tuple[str, Any]]]] = []
        used = _matmul_weights(function)
        for op in function.operations:
            self._take(op, weights, used)

    def _take(self, op: Any, weights: dict[bytes, np.ndarray], multiplied: set[str]) -> None:
        if op.op_type == "const":
            self._constants[op.outputs[0].name] = _shared(op.outputs[0], weights, multiplied)
            return
        arguments = [(key, _names(value)) for key, value in op.inputs.items() if value is not None]
        if op.op_type not in (*KERNELS, "read_state", "coreml_update_state"):
            raise ParityError(
                f"function {self.name}: operation {op.op_type} is unknown to the interpreter"
            )
        if op.op_type.startswith("constexpr_"):
            given = {key: self._constants[name] for key, name in arguments}
            key = hashlib.sha256(b"".join(_bytes(v) for v in given.values())).digest()
            if key not in weights:
                exact = KERNELS[op.op_type](given).astype(np.float16)
                weights[key] = exact.astype(np.float32)
            self._constants[op.outputs[0].name] = weights[key]
            return
        self._steps.append((op, [_numpy_type(var) for var in op.outputs], arguments))

    def constant(self, name: str) -> Any:
        """A constant by its name, decompressed; None if the function has no such constant."""
        return self._constants.get(name)

    def new_state(self) -> State:
        """States filled with zeros, as Core ML's ``makeState`` makes them."""
        return {name: np.zeros(shape, np.float16) for name, shape in self.states.items()}

    def __call__(
        self, inputs: Mapping[str, np.ndarray], state: State | None = None
    ) -> dict[str, np.ndarray]:
        """Run the function; ``state`` is changed in place.

        Raises:
            ParityError: an input is missing or of another type or shape than the package says.
        """
        values: dict[str, Any] = {}
        for name, (shape, dtype) in self.inputs.items():
            if name not in inputs:
                raise ParityError(f"function {self.name} lacks its input {name}")
            given = np.asarray(inputs[name])
            if given.shape != shape or given.dtype != dtype:
                raise ParityError(
                    f"input {name} of function {self.name} is {given.dtype} {given.shape}; the "
                    f"package says {dtype} {shape}"
                )
            values[name] = given
        held = state if state is not None else self.new_state()
        with np.errstate(all="ignore"):
            for op, kinds, arguments in self._steps:
                self._run(op, kinds, arguments, values, held)
        return {name: np.asarray(values[name]) for name in self._outputs}

    def _run(
        self, op: Any, kinds: list[Any], arguments: list[Any], values: dict[str, Any], held: State
    ) -> None:
        if op.op_type == "read_state":
            values[op.outputs[0].name] = held[op.input.name]
            return
        given = {key: self._value(names, values) for key, names in arguments if key != "state"}
        if op.op_type == "coreml_update_state":
            held[op.state.name] = np.asarray(given["value"])
            values[op.outputs[0].name] = held[op.state.name]
            return
        found = KERNELS[op.op_type](given)
        results = found if isinstance(found, list) else [found]
        for var, kind, result in zip(op.outputs, kinds, results, strict=True):
            if np.shape(result) != tuple(var.shape):
                raise ParityError(
                    f"function {self.name}: {op.op_type} {var.name} is {np.shape(result)}, the "
                    f"program says {tuple(var.shape)}"
                )
            values[var.name] = result.astype(kind, copy=False) if kind else result

    def _value(self, names: Any, values: dict[str, Any]) -> Any:
        if isinstance(names, list):
            return [self._value(name, values) for name in names]
        return values[names] if names in values else self._constants[names]


def _names(value: Any) -> Any:
    return [v.name for v in value] if isinstance(value, list | tuple) else value.name


def _bytes(value: Any) -> bytes:
    array = np.ascontiguousarray(value)
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()


def _numpy_type(var: Any) -> Any:
    kind = var.sym_type
    primitive = kind.get_primitive() if types.is_tensor(kind) else kind
    return np.dtype(types.nptype_from_builtin(primitive)) if not types.is_str(primitive) else None


def _matmul_weights(function: Any) -> set[str]:
    """Names of constants that linear layers take: kept as float32, which numpy multiplies fast."""
    found = set()
    for op in function.operations:
        if op.op_type == "linear":
            found |= {op.weight.name} | ({op.bias.name} if op.bias is not None else set())
    return found


def _shared(var: Any, weights: dict[bytes, np.ndarray], multiplied: set[str]) -> Any:
    """A constant; large ones once for all functions that have the same."""
    value = var.val
    if not isinstance(value, np.ndarray) or value.size < 1024:
        return value
    key = hashlib.sha256(_bytes(value)).digest()
    if key not in weights:
        weights[key] = value.astype(np.float32) if var.name in multiplied else value
    return weights[key]
