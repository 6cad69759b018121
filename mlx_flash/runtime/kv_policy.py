"""How the keys and values of past tokens are kept, and what they take of a budget.

A policy makes the caches that a model is generated with, says how many bytes they take for a
context, and how many tokens a cache holds: a bounded one may run past the context in text, as long
as what it holds fits.

``KV_POLICIES`` names them. To add one, write a class (``OverPlainKV`` where every plain cache is
replaced by another one) and its entry.

Knows: mlx-lm's caches. Does not know: budgets. MLX is imported late, so that the command line can
check a spec without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mlx_flash.errors import CacheError, FlashError, ModelError

if TYPE_CHECKING:
    import mlx.nn as nn

    from mlx_flash.model_directory.directory import ModelDirectory

DEFAULT_KV = "plain"
GROWTH = 256  # mlx-lm's KV caches grow by 256 tokens
LONGEST_CHUNK = 2048  # tokens, as in mlx-lm; one goes into a bounded cache before others leave
FIRST_KEPT = 4  # tokens at the beginning that mlx-lm's rotating cache never drops
BITS = (2, 3, 4, 6, 8)
GROUPS = (64, 32)  # numbers to a scale; the largest that divides a head


class KVPolicy(Protocol):
    """Keys and values of one model's past tokens."""

    def make_cache(self, model: nn.Module) -> list[Any]:
        """The caches of a model for one prompt, as mlx-lm's ``make_prompt_cache`` returns them.

        Raises:
            ModelError: the policy does not work with this model.
        """

    def bytes(self, context: int) -> int:
        """Bytes that caches for ``context`` tokens take at most, copies while they grow included.

        Raises:
            ModelError: the policy does not work with this model.
        """

    def held(self, cache: Any, coming: int = 0, chunk: int = 1) -> int:
        """Tokens that a cache holds at most while ``coming`` more are put in.

        Args:
            cache: from ``make_cache``, or any other of mlx-lm's; None holds nothing.
            chunk: tokens that are put in at a time.
        """


class PlainKV:
    """mlx-lm's own caches of a family: every token, the last of a sliding window, or a state."""

    def __init__(self, directory: ModelDirectory) -> None:
        self._directory = directory

    def make_cache(self, model: nn.Module) -> list[Any]:
        """See ``KVPolicy``."""
        return plain_cache(model)

    def bytes(self, context: int) -> int:
        """See ``KVPolicy``. Forward passes are built, not computed; their caches' shapes tell."""
        sizes = [_leaf_bytes(leaf, context) for leaf in leaves(self._built())]
        return sum(sizes) + max(sizes, default=0)  # a layer's cache is copied as it grows

    def held(self, cache: Any, coming: int = 0, chunk: int = 1) -> int:
        """See ``KVPolicy``; of a batch, in its longest sequence. A state counts no tokens."""
        found = [_tokens(leaf, coming, chunk) for leaf in leaves(cache)]
        return max((n for n in found if n is not None), default=coming)

    def _built(self) -> list[Any]:
        """Caches that hold some tokens, not computed."""
        from .foreign_errors import foreign_errors

        with foreign_errors(self._directory):
            return _forward(self._directory, self.make_cache)


class OverPlainKV(PlainKV, ABC):
    """Another cache in place of every plain one; a model with others is refused."""

    def __init__(self, directory: ModelDirectory, spec: str) -> None:
        super().__init__(directory)
        self._spec = spec

    def make_cache(self, model: nn.Module) -> list[Any]:
        """See ``KVPolicy``."""
        from mlx_lm.models.cache import KVCache

        plain = plain_cache(model)
        if other := sorted({type(c).__name__ for c in plain if type(c) is not KVCache}):
            raise ModelError(
                f"KV policy {self._spec!r} takes the place of plain KV caches, but models of type "
                f"{self._directory.config['model_type']} have {', '.join(other)}; use 'plain'"
            )
        return [self.other() for _ in plain]

    @abstractmethod
    def other(self) -> Any:
        """A cache for one layer."""

    def _built(self) -> list[Any]:
        PlainKV(self._directory)._built()  # a damaged model is told as such
        try:
            return _forward(self._directory, self.make_cache)
        except (FlashError, MemoryError):
            raise
        except Exception as error:  # the family's attention takes arrays only, or whatever else
            raise ModelError(
                f"KV policy {self._spec!r} does not work with models of type "
                f"{self._directory.config['model_type']} ({type(error).__name__}: {error}); use "
                "'plain'"
            ) from error


class RotatingKV(OverPlainKV):
    """The last ``size`` tokens and the first four of the text; what lies between is dropped.

    Args:
        size: tokens, more than four.
    """

    def __init__(self, directory: ModelDirectory, size: int) -> None:
        super().__init__(directory, f"rotating:{size}")
        self._size = size

    def other(self) -> Any:
        from mlx_lm.models.cache import RotatingKVCache

        return RotatingKVCache(max_size=self._size, keep=FIRST_KEPT)


class QuantizedKV(OverPlainKV):
    """Every token, in few bits.

    Args:
        bits: to a number, one of ``BITS``.
    """

    def __init__(self, directory: ModelDirectory, bits: int) -> None:
        super().__init__(directory, f"quantized:{bits}")
        self._bits, self._group = bits, 0

    def other(self) -> Any:
        from mlx_lm.models.cache import QuantizedKVCache

        return QuantizedKVCache(group_size=self._group_size(), bits=self._bits)

    def _group_size(self) -> int:
        if not self._group:
            plain = PlainKV(self._directory)._built()
            widths = {a.shape[-1] for leaf in leaves(plain) for a in _arrays(leaf)}
            fits = [g for g in GROUPS if not any(width % g for width in widths)]
            if not fits:
                raise ModelError(
                    f"KV policy {self._spec!r} needs heads of a multiple of {GROUPS[-1]} numbers, "
                    f"this model's have {', '.join(map(str, sorted(widths)))}; use 'plain'"
                )
            self._group = fits[0]
        return self._group


@dataclass(frozen=True)
class KVKind:
    """An entry of ``KV_POLICIES``.

    Args:
        make: model directory, and the number of the spec where there is one -> policy.
        number: the number's name for people, and which ones there may be; None where a spec has
            none.
    """

    make: Callable[..., KVPolicy]
    number: tuple[str, Callable[[int], bool]] | None = None


KV_POLICIES: dict[str, KVKind] = {
    "plain": KVKind(PlainKV),
    "rotating": KVKind(
        RotatingKV, (f"SIZE, a number of tokens above {FIRST_KEPT}", lambda n: n > FIRST_KEPT)
    ),
    "quantized": KVKind(
        QuantizedKV, (f"BITS, one of {', '.join(map(str, BITS))}", lambda n: n in BITS)
    ),
}


def check_kv(spec: str) -> tuple[str, int | None]:
    """(name, number) of a spec such as "plain", "rotating:4096" (tokens), "quantized:8" (bits).

    Raises:
        CacheError: there is no such policy, or it cannot have that number.
    """
    name, colon, text = spec.partition(":")
    if name not in KV_POLICIES:
        raise CacheError(f"KV policy {spec!r}; expected one of {', '.join(KV_POLICIES)}")
    number = KV_POLICIES[name].number
    if number is None:
        if colon:
            raise CacheError(f"KV policy {spec!r}: {name} takes no number; leave {text!r} out")
        return name, None
    what, allowed = number
    if not text.isdecimal() or not allowed(int(text)):
        raise CacheError(f"KV policy {spec!r}; expected {name}:{what}")
    return name, int(text)


def make_kv_policy(spec: str, directory: ModelDirectory) -> KVPolicy:
    """The policy that a spec names, for the model in a directory.

    Raises:
        CacheError: see ``check_kv``.
    """
    name, number = check_kv(spec)
    given = () if number is None else (number,)
    return KV_POLICIES[name].make(directory, *given)


def plain_cache(model: nn.Module) -> list[Any]:
    """mlx-lm's own caches of a model, whatever policy it was loaded with."""
    from mlx_lm.models.cache import make_prompt_cache

    own = getattr(model, "own_cache", None)
    return own() if own else make_prompt_cache(model)


def _forward(directory: ModelDirectory, make_cache: Callable[[nn.Module], list[Any]]) -> list[Any]:
    """The caches of a new model after some tokens, none of which is computed."""
    import mlx.core as mx

    from mlx_flash.models.registry import make_model

    model = make_model(directory.config)
    model.set_dtype(directory.dtype)
    cache = make_cache(model)
    for tokens in (1, 2):
        model(mx.zeros((1, tokens), mx.int32), cache=cache)
    return cache


def leaves(cache: Any) -> Iterator[Any]:
    """The caches of a prompt cache, those inside a CacheList one by one."""
    for entry in cache or ():
        inner = getattr(entry, "caches", None)
        yield from leaves(inner) if inner is not None else (entry,)


def _arrays(leaf: Any) -> list[Any]:
    """Keys and values [batch, heads, tokens, width], of quantised ones their parts; else empty."""
    from mlx.utils import tree_flatten

    parts = (getattr(leaf, "keys", None), getattr(leaf, "values", None))
    found = [a for _, a in tree_flatten(parts) if a is not None]
    return found if all(a.ndim == 4 for a in found) else []


def _leaf_bytes(leaf: Any, context: int) -> int:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays = _arrays(leaf)
    if not arrays:
        return sum(a.nbytes for _, a in tree_flatten(leaf.state) if isinstance(a, mx.array))
    tokens = (context // GROWTH + 1) * GROWTH
    if size := getattr(leaf, "max_size", None):
        tokens = min(tokens, size + LONGEST_CHUNK)
    return tokens * sum(a.nbytes // a.shape[2] for a in arrays)


def _offset(leaf: Any) -> int | None:
    """Tokens that went into one cache, of a batch the most; None where they are not counted."""
    offset = getattr(leaf, "offset", None)
    if hasattr(offset, "max"):  # of a batch
        offset = max(0, int(offset.max().item()))
    return offset if isinstance(offset, int) else None


def tokens_seen(cache: Any) -> int:
    """Tokens of a text that a prompt cache has seen, those that it has dropped included."""
    return max((_offset(leaf) or 0 for leaf in leaves(cache)), default=0)


def _tokens(leaf: Any, coming: int, chunk: int) -> int | None:
    """Tokens in one cache at most while more come; None for one that does not count them."""
    offset = _offset(leaf)
    if offset is None:
        return None
    size = getattr(leaf, "max_size", None)
    return offset + coming if size is None else min(offset + coming, size + chunk - 1)


def tokens_in(leaf: Any) -> int:
    """Tokens that one cache holds now; 0 for one that does not count them."""
    return _tokens(leaf, 0, 1) or 0
