"""Runs the dense packages of an export in the interpreter, as a host app would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coreml_export.program.layers import MASKED

from .interpreter import Package, State

Chains = Mapping[str, Sequence[tuple[str, str]]]


def causal_mask(position: int, length: int, context: int) -> np.ndarray:
    """A function's input ``causalMask`` [1, 1, length, context]: 0 at visible keys, else MASKED."""
    own = position + np.arange(length)[:, None]
    mask = np.where(np.arange(context)[None] <= own, 0, MASKED)
    return mask.astype(np.float16)[None, None]


class DenseRunner:
    """One sequence over the dense packages.

    Args:
        packages: by the names that chains use.
        chains: name -> (package, function) in the order of calls.
        lengths: how many tokens each chain takes at once.
        context: tokens that the states hold.
    """

    def __init__(
        self,
        packages: Mapping[str, Package],
        chains: Chains,
        lengths: Mapping[str, int],
        context: int,
    ) -> None:
        self.packages, self.chains, self.lengths = packages, chains, lengths
        self.context = context
        self.position = 0
        self._states: dict[str, State] = {}

    def reset(self) -> None:
        """Begin a new sequence."""
        self.position = 0
        self._states = {}

    def call(self, name: str, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Run a chain for as many tokens as it takes; returns logits [tokens, vocabulary].

        A last chunk may be shorter: what fills it up is written behind it, never seen by it, and
        overwritten by the next tokens.
        """
        length, count = self.lengths[name], len(tokens)
        if not 0 < count <= length or self.position + length > self.context:
            raise ValueError(f"{count} tokens at {self.position} for {name} of {length}")
        ids = np.zeros((1, length), np.int32)
        ids[0, :count] = tokens
        values = {
            "inputIds": ids,
            "position": np.array([self.position], np.int32),
            "causalMask": causal_mask(self.position, length, self.context),
        }
        for package, function_name in self.chains[name]:
            function = self.packages[package].function(function_name)
            if function.states and package not in self._states:
                self._states[package] = function.new_state()
            given = {key: values[key] for key in function.inputs}
            result = function(given, self._states.get(package))
            values["hidden"] = result.get("hiddenOut", result.get("hidden"))
            values |= {key: value for key, value in result.items() if key == "logits"}
        self.position += count
        return values["logits"][0, :count].astype(np.float32)

    def prompt(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits of a prompt, by ``prefill`` while whole chunks fit, the rest by ``decode``."""
        chunk = self.lengths["prefill"]
        found, at = [], 0
        while at < len(tokens):
            fits = len(tokens) - at >= chunk and self.position + chunk <= self.context
            step = chunk if fits else 1
            found.append(self.call("prefill" if fits else "decode", tokens[at : at + step]))
            at += step
        return np.concatenate(found)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Logits of tokens given one at a time."""
        return np.concatenate([self.call("decode", [token]) for token in tokens])

    def greedy(self, prompt: Sequence[int], count: int, prefill: bool = True) -> list[int]:
        """Continue a prompt by ``count`` tokens, the likeliest each time."""
        self.reset()
        logits = (self.prompt if prefill else self.decode)(prompt)[-1]
        found = [int(logits.argmax())]
        while len(found) < count:
            found.append(int(self.decode(found[-1:])[-1].argmax()))
        return found
