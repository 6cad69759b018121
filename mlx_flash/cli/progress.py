"""Progress on stderr, shown where somebody looks at it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any


class _Bar:
    """A tqdm bar for as long as a command works."""

    def __init__(self, name: str, **how: Any) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, disable=None, **how)

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


class ByteBar(_Bar):
    """Bytes of one piece of work, and what they belong to.

    Args:
        name: of the work.
        total: bytes, where they are known before it begins.
    """

    def __init__(self, name: str, total: int | None = None) -> None:
        super().__init__(name, total=total, unit="B", unit_scale=True)

    def __call__(self, nbytes: int, what: str = "") -> None:
        """``nbytes`` more are done, of ``what``; as "total" it is how many there are."""
        if what == "total":
            self._bar.reset(total=nbytes)
            return
        if what:
            self._bar.set_postfix_str(what, refresh=False)
        self._bar.update(nbytes)

    def note(self, what: str) -> None:
        """Say what is being done that no bytes are counted of."""
        self._bar.set_postfix_str(what)


class StageBar(_Bar):
    """Stages one behind the other, each with a count of its own.

    Args:
        name: of the work.
        units: stage -> what it counts.
        unit: what all other stages count.
        scaled: stages whose counts are so large that they are shown as K, M, G.
    """

    def __init__(
        self, name: str, units: Mapping[str, str], unit: str, scaled: Collection[str] = ()
    ) -> None:
        super().__init__(name)
        self._units, self._unit, self._scaled = units, unit, scaled
        self._stage, self._done = "", 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """``done`` of ``total`` are done of a stage; one that begins again counts from 0."""
        if stage != self._stage or done < self._done:
            self._bar.reset(total=total)
            self._bar.set_description(stage, refresh=False)
            self._bar.unit = self._units.get(stage, self._unit)
            self._bar.unit_scale = stage in self._scaled
            self._stage, self._done = stage, 0
        self._bar.update(done - self._done)
        self._done = done


class TokenBar(_Bar):
    """Tokens of several runs, each of which counts as whole once it has ended.

    Args:
        name: of the work.
        each: tokens of a run.
        runs: how many there are.
    """

    def __init__(self, name: str, each: int, runs: int) -> None:
        super().__init__(name, total=each * runs, unit="token")
        self._each, self._runs = each, 0

    def __call__(self, tokens: int) -> None:
        """So many more tokens of this run are done."""
        self._bar.update(tokens)

    def ended(self) -> None:
        """A run has ended, whether it took all its tokens or none."""
        self._runs += 1
        self._bar.n = self._each * self._runs
        self._bar.refresh()
