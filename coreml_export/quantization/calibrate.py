"""int8 and int4 codes of a whole model that fit its inputs: it is run over text, layer by layer.

A first run, over less text, finds scales between what gives a channel and what takes it
(``channel_scaling``). In the second each linear layer, when its turn comes, is read, rounded by
what comes in (``gptq``), and passed on as it will be stored, so that later layers make up for
earlier ones. It is then let go: memory holds one matrix and the hidden states. Products are
numpy's: MLX's on a Linux CPU take forty times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from coreml_export.source import tokenizer
from coreml_export.source.decoder_spec import Decoder, Tensor, column_slices, tensors
from coreml_export.source.weights_source import Source

from .channel_scaling import Finder, Scales, folds
from .formats import QuantizedRows
from .gptq import compensated
from .recipes import Recipe, scheme_of
from .stored_weights import StoredWeights, read

CODES = "codes"  # directory that holds codes while an export is made
TEXTS = 40
SCALING_TEXTS = 8  # scales need less
TOKENS = 256
TIED = 1.0  # of the mean diagonal, for a matrix that is looked up as well as multiplied with
FIRST, APART = 60_000, 9_600  # letters of Persuasion; the report's text comes long before


class CalibratedWeights:
    """Tensors whose codes were found on text, kept on disk; all others are as elsewhere.

    Args:
        path: an empty directory.
        others: where tensors come from that have no codes here.
    """

    def __init__(self, path: Path, others: StoredWeights) -> None:
        self._path, self._others = path, others
        self._files: dict[tuple[str, tuple[int, int] | None], Path] = {}

    def put(self, name: str, columns: tuple[int, int] | None, packed: QuantizedRows) -> None:
        """Keep what a tensor, or a range of its columns, is stored as."""
        file = self._path / f"{len(self._files)}.npz"
        scale = {} if packed.scale is None else {"scale": packed.scale}
        np.savez(file, scheme=packed.scheme, data=packed.data, **scale)
        self._files[name, columns] = file

    def packed(self, tensor: Tensor) -> QuantizedRows:
        """See ``StoredWeights``."""
        file = self._files.get((tensor.name, tensor.columns))
        if file is None:
            return self._others.packed(tensor)
        with np.load(file) as found:
            data, scale = found["data"], found.get("scale")
            scheme = str(found["scheme"])
        if scale is None:
            return QuantizedRows(scheme, data)
        if tensor.rows is not None:
            data, scale = data[tensor.rows], scale[tensor.rows]
        return QuantizedRows(scheme, data, scale)


def calibrate(
    source: Source,
    decoder: Decoder,
    chosen: Recipe,
    fp32_residual: bool,
    out: Path,
    others: StoredWeights,
    progress: Callable[[int], Any] | None = None,
    ffn_norm_has_other_readers: bool = False,
) -> CalibratedWeights:
    """Find the codes of every int4 and int8 matrix of a linear layer.

    Args:
        chosen: which tensor is stored in how many bits.
        fp32_residual: the head is stored in slices.
        out: the export being made; its tokenizer is there, and the directory CODES will be.
        others: where all other tensors come from.
        progress: called with the bytes of each tensor read, as float32.
        ffn_norm_has_other_readers: more than the FFN takes what its norm gives, such as a trained
            predictor, so that norm's weight must not be scaled.

    Raises:
        ExportError: a matrix has numbers that fp16 cannot hold.
    """
    (out / CODES).mkdir()
    found = CalibratedWeights(out / CODES, others)
    schemes = quantized_matrices(source, decoder, chosen)
    names = set(schemes)
    head = decoder.head.weight
    scales = scaling(source, decoder, schemes, out, ffn_norm_has_other_readers)
    for name, divisor in scales.norms():
        weight = (source.take(name) / divisor).astype(np.float16)
        found.put(name, None, QuantizedRows("fp16", weight))

    def take(name: str, x: mx.array) -> np.ndarray:
        """Round a matrix by what comes in; gives what goes out."""
        given = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        array = scales.of(name, read(source, Tensor(name)))
        pieces = [None]
        if fp32_residual and name == head.name:
            pieces = [piece.columns for piece in column_slices(head, array.shape[1])]
        edges = [a for a, _ in (p or (0, 0) for p in pieces)] + [array.shape[1]]
        moments = given.T @ given / len(given)
        if name == decoder.embedding.name:  # it is looked up, too: its numbers count as such
            moments[np.diag_indices(len(moments))] += TIED * np.diagonal(moments).mean()
        rounded = compensated(array, moments, schemes[name], edges)
        for columns, packed in zip(pieces, rounded, strict=True):
            found.put(name, columns, packed)
        if progress:
            progress(array.nbytes)
        if name == head.name:
            return given[:, :1]  # nothing comes after it
        return given @ np.concatenate([p.floats() for p in rounded], axis=1).T

    model = _hooked(source, decoder, names, take)
    for name, _ in scales.norms():
        module = _at(model, name.removesuffix(".weight"))
        module.weight = mx.array(found.packed(Tensor(name)).floats())
    model(_texts(decoder, out, TEXTS))  # layers that are hooked compute when they are called
    return found


def quantized_matrices(source: Source, decoder: Decoder, chosen: Recipe) -> dict[str, str]:
    """Name of every matrix that is rounded on text -> int4 or int8."""
    found = {}
    for tensor, matrix in tensors(decoder):
        if matrix:
            found[tensor.name] = scheme_of(tensor.name, source.shapes[tensor.name], chosen)
    return {name: scheme for name, scheme in found.items() if scheme in ("int4", "int8")}


def scaling(
    source: Source,
    decoder: Decoder,
    schemes: dict[str, str],
    out: Path,
    ffn_norm_has_other_readers: bool,
) -> Scales:
    """Run the float model over text and find the scales between its channels."""
    finder = Finder(folds(decoder, schemes, ffn_norm_has_other_readers), schemes)
    head = decoder.head.weight.name

    def take(name: str, x: mx.array) -> np.ndarray:
        given = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if name == head:
            return given[:, :1]  # nothing comes after it
        array = source.take(name)
        finder.see(name, array, given)
        return given @ array.T

    if finder.wanted:
        model = _hooked(source, decoder, set(schemes), take)
        model(_texts(decoder, out, min(TEXTS, SCALING_TEXTS)))
    return finder.scales


def _texts(decoder: Decoder, out: Path, count: int) -> mx.array:
    length = min(TOKENS, decoder.limit or TOKENS)
    texts = [tokenizer.sample(out / "tokenizer", length, FIRST + APART * i) for i in range(count)]
    return mx.array(np.array(texts, np.int32) % decoder.vocab)


def _hooked(
    source: Source, decoder: Decoder, names: set[str], take: Callable[..., np.ndarray]
) -> Any:
    """The model, its linear layers calling ``take`` with a matrix' name and their input."""
    model = source.prepared(names - {decoder.embedding.name})
    for name in sorted(names):
        path = name.removesuffix(".weight")
        module = _at(model, path)
        if isinstance(module, nn.Linear):
            _put(model, path, _Linear(module, name, take))
        elif isinstance(module, nn.Embedding) and name == decoder.head.weight.name:
            _put(model, path, _Tied(module, name, take))
    return model


class _Linear(nn.Module):
    """A linear layer whose matrix is read when it is called, once."""

    def __init__(self, whole: nn.Linear, name: str, take: Callable[..., np.ndarray]) -> None:
        super().__init__()
        self._bias = whole.bias if "bias" in whole else None
        self._name, self._take = name, take

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.array(self._take(self._name, x)).reshape(*x.shape[:-1], -1)
        return y if self._bias is None else y + self._bias


class _Tied(nn.Module):
    """An embedding that is the head, too."""

    def __init__(self, whole: nn.Embedding, name: str, take: Callable[..., np.ndarray]) -> None:
        super().__init__()
        self._whole, self._name, self._take = whole, name, take

    def __call__(self, ids: mx.array) -> mx.array:
        return self._whole(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return mx.array(self._take(self._name, x)).reshape(*x.shape[:-1], -1)


def _at(model: Any, path: str) -> Any:
    for step in path.split("."):
        model = model[int(step)] if isinstance(model, list) else getattr(model, step)
    return model


def _put(model: Any, path: str, module: Any) -> None:
    above, _, last = path.rpartition(".")
    parent = _at(model, above) if above else model
    if isinstance(parent, list):
        parent[int(last)] = module
    else:
        setattr(parent, last, module)
