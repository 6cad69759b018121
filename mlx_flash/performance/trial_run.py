"""A model tried out for a few tokens: what a token takes in each way of running it, which rows.

Three ways are timed, each where the RAM budget allows it: every layer streamed, rows read as they
are needed, everything resident. Of a model whose rows are needed as they fire, or whose experts are
chosen, the use of rows is recorded on a longer text. All of it is kept in the user's cache
directory, under what it depends on, so that any other budget is arithmetic (``forecast``).

Knows: how to load and run a model directory within a budget. Does not know: other budgets, users.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash import __version__
from mlx_flash.calibration import probes
from mlx_flash.calibration.experts import trace
from mlx_flash.common import files, user_cache
from mlx_flash.common.platform import current_platform
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import mixtures
from mlx_flash.models.quantized_rows import without
from mlx_flash.paging.policies import make_policy
from mlx_flash.paging.simulate import miss_counts
from mlx_flash.paging.sparse_ffn import SparseMLP
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.selection import Selection
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.memory_plan import Plan, plan_for, way_budgets
from mlx_flash.runtime.memory_requirements import (
    LEAST_SHARE,
    MemoryRequirements,
    memory_requirements,
)
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.runtime.paged_model import LOOKAHEAD
from mlx_flash.storage.reader import RowReader

from . import disk_speed
from .disk_speed import DiskSpeed
from .forecast import Timing, TrialRun
from .row_trace import RowUse
from .teacher_forcing import ForcedRun, Step, book, walk

FORMAT_VERSION = 1
WARM = 4  # of them are decoded before timing counts
LEAST = 8  # tokens that are decoded however long it takes
TIMED_SECONDS = 20.0
SEQUENCE, SEQUENCES, CHUNK = 128, 4, 32  # tokens of what is recorded
RECORD_SECONDS = 30.0
FEWER = 0.2  # share of requests that a second run must save to tell what a request costs
START = 0.5  # share of the book where it begins; ``bench`` begins at its beginning
TRIED_SHARE = {False: 0.2, True: 0.5}  # cached at most while paging is tried; of a mixture

Progress = Callable[[str], Any]


@dataclass(frozen=True)
class Model:
    """What is tried out: a directory, its needs, and how rows are chosen and kept."""

    directory: ModelDirectory
    needs: MemoryRequirements
    selection: Selection | None
    options: PagingOptions
    tokenizer: Any

    @property
    def parts(self) -> list[str] | None:
        """Parts of a row that are read; None for all."""
        if self.selection is None or self.selection.provides is None:
            return None
        names = [part.name for part in self.directory.rows.layout.parts]
        return without(names, self.selection.provides)


def run_trial(
    model: Model,
    ram: int,
    disk: DiskSpeed,
    again: bool = False,
    progress: Progress | None = None,
) -> TrialRun:
    """What is known of a model; what is not, and ``ram`` has room for, is tried now.

    Args:
        again: try anew what is known already, too; what ``ram`` has no room for stays as it is.
        progress: told what is being done.
    """
    key = files.digest_of(_facts(model))
    found = _recall(key)
    known = set() if again else set(found.ways)
    if found.use is None:
        known.discard("paged")
    todo = [way for way in ways_within(model, ram) if way not in known]
    if not todo:
        return found
    trial = _Trial(model, ram, disk, progress or (lambda _: None))
    for way in todo:
        found.ways[way] = trial.run(way)
    found.use = trial.use or found.use
    found.measured = date.today().isoformat()
    _remember(key, found)
    return found


def ways_within(model: Model, ram: int) -> list[str]:
    """Ways to run a model that a budget has room for, in the order in which to try them."""
    return [way for way, least in way_budgets(model.needs).items() if ram >= least]


def _facts(model: Model) -> dict[str, Any]:
    directory = model.directory
    file = directory.path / predictor_file.NAME
    trained = None
    if model.selection and model.selection.trained:
        stat = file.stat()
        trained = [stat.st_size, stat.st_mtime_ns]
    return disk_speed.machine_facts() | {
        "package": __version__,
        "trial_run": FORMAT_VERSION,
        "rows": directory.rows.fingerprint,
        "disk": directory.rows.path.stat().st_dev,
        "predictor": model.selection.kind if model.selection else None,
        "trained": trained,
        "policy": model.options.policy if model.needs.paging else None,
        "lookahead": LOOKAHEAD,
    }


def _recall(key: str) -> TrialRun:
    known = user_cache.recall("models.json", key)
    found = TrialRun()
    with contextlib.suppress(KeyError, TypeError, ValueError, OSError, AttributeError):
        ways = {str(way): Timing(**figures) for way, figures in known["ways"].items()}
        if known["use"]:
            file = current_platform().cache_folder() / f"{key}.npz"
            found.use = RowUse.from_bytes(file.read_bytes())
        found.ways, found.measured = ways, str(known["measured"])
    return found


def _remember(key: str, found: TrialRun) -> None:
    """Keep it; where the cache directory cannot be written the next call measures again."""
    with contextlib.suppress(OSError):
        if found.use:
            directory = current_platform().cache_folder()
            directory.mkdir(parents=True, exist_ok=True)
            files.atomic_write(directory / f"{key}.npz", found.use.to_bytes())
        fields = {
            "ways": {way: asdict(tried) for way, tried in found.ways.items()},
            "use": found.use is not None,
            "measured": found.measured,
        }
        user_cache.remember("models.json", key, fields)


class _Trial:
    """One trial run."""

    def __init__(self, model: Model, ram: int, disk: DiskSpeed, progress: Progress) -> None:
        self.model, self.ram, self.disk, self.progress = model, ram, disk, progress
        self.use: RowUse | None = None
        positions = model.directory.positions or SEQUENCE
        self.length = max(8, min(SEQUENCE, positions))
        # A half is read as a prompt, a quarter decoded first, the rest after it.
        self.first, self.second = self.length // 2, self.length * 3 // 4
        self.tokens = book(model.tokenizer, self.length * SEQUENCES, START)

    def run(self, way: str) -> Timing:
        """Load the model one way and time it; of rows that are chosen, record which."""
        self.progress(f"timing, {way}")
        options = self.model.options.replace(ram=self.ram, context=self.length + 2)
        if way == "paged":
            options = options.replace(cache_share=self._share())
        elif not self.model.directory.mixture:
            options = options.replace(kept_share=0.0 if way == "streamed" else 1.0)
        else:
            options = options.replace(cache_share=1.0)
        with self._loaded(options) as loaded:
            runs = [self._walk(loaded, self.first, self.second)]
            if way == "paged":  # the first run has touched all memory, the last finds its rows
                runs = [self._walk(loaded, self.second, self.length - 2) for _ in range(2)]
                self.progress("recording which rows are needed")
                self.use = self._record(loaded)
            return self._tried(way, runs, loaded.flash.plan)

    def _walk(self, loaded: nn.Module, prompt: int, stop: int) -> ForcedRun:
        return walk(
            loaded,
            self.tokens[:prompt],
            self.tokens[prompt:stop],
            seconds=TIMED_SECONDS,
            least=min(LEAST, stop - prompt),
        )

    @contextmanager
    def _loaded(self, options: PagingOptions) -> Iterator[nn.Module]:
        model = None
        try:
            model = load_model(self.model.directory, options)
            model.flash.max_tokens = None
            yield model
        finally:
            if model is not None:
                model.flash.close()
            del model
            gc.collect()
            mx.clear_cache()

    def _share(self) -> float:
        """Share of every layer's rows to cache while paging is tried."""
        model, options = self.model, self.model.options.replace(context=self.length + 2)
        reader = RowReader(model.directory.rows)
        try:
            needs = memory_requirements(model.directory, reader, options, model.selection)
        finally:
            reader.close()

        machine = current_platform().machine_bytes()

        def takes(share: float) -> int:
            return plan_for(needs, options.replace(cache_share=share), machine).total

        low, high = 1 / LEAST_SHARE, TRIED_SHARE[bool(model.directory.mixture)]
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if takes(middle) <= self.ram else (low, middle)
        return low

    def _record(self, loaded: nn.Module) -> RowUse:
        """What each token of some sequences needs of each layer."""
        rows = tuple(layer.rows for layer in self.model.directory.rows.layers)
        sequences = self.tokens.reshape(SEQUENCES, -1)
        record = self._experts(loaded) if self.model.directory.mixture else self._neurons(loaded)
        began, found = time.perf_counter(), []
        for sequence in sequences:
            found.append(record(sequence))
            if time.perf_counter() - began > RECORD_SECONDS * len(found) / (len(found) + 1):
                break
        return RowUse(
            rows,
            tuple(np.concatenate([one[i] for one in found]) for i in range(len(rows))),
        )

    def _experts(self, loaded: nn.Module) -> Callable[[np.ndarray], list[np.ndarray]]:
        directory = self.model.directory
        _, top_k = mixtures.expert_counts(directory.config, directory.mixture)
        recorder = trace.Recorder(loaded, top_k)

        def record(tokens: np.ndarray) -> list[np.ndarray]:
            arrays = recorder.run(tokens, loaded.flash.plan.step)
            found = []
            for i, layer in enumerate(directory.rows.layers):
                active = np.zeros((len(tokens), layer.rows), bool)
                np.put_along_axis(active, arrays[f"chosen-{i}"].astype(np.int64), True, axis=1)
                found.append(active)
            return found

        return record

    def _neurons(self, loaded: nn.Module) -> Callable[[np.ndarray], list[np.ndarray]]:
        flash = loaded.flash
        seen: list[list[np.ndarray]] = [[] for _ in flash.ffns]
        modules = dict(loaded.named_modules())
        watchers = {
            path: _watcher(modules[path], lists)
            for (path, _), lists in zip(flash.ffns, seen, strict=True)
            if isinstance(modules[path], SparseMLP)
        }
        probes.tap(loaded, watchers)
        chunk = max(1, min(CHUNK, flash.plan.step))

        def record(tokens: np.ndarray) -> list[np.ndarray]:
            for lists in seen:
                lists.clear()
            probes.run(loaded, tokens, chunk)
            found = []
            for layer, steps in zip(self.model.directory.rows.layers, seen, strict=True):
                active = np.zeros((len(tokens), layer.rows), bool)
                for i, numbers in enumerate(steps):
                    active[i, numbers] = True
                found.append(active)
            return found

        return record

    def _tried(self, way: str, runs: list[ForcedRun], plan: Plan) -> Timing:
        """Figures of a run; a second one is over the same text, when slots hold more of it."""
        steps = _counted(runs[0])
        tried = {
            "ram": self.ram, "tokens": len(steps), "compute": _compute(steps),
            "wait": _mean(steps, "wait_seconds"), "read": _mean(steps, "read_seconds"),
            "nbytes": _mean(steps, "bytes_read"), "requests": _mean(steps, "requests"),
        }  # fmt: skip
        if way == "streamed":
            tried["rate"] = tried["read"] / max(tried["nbytes"] / self.disk.sequential, 1e-9)
        elif way == "paged" and self.use is not None:
            seconds, nbytes = self._expected(plan, len(runs[0].steps), len(steps))
            if seconds > 0 and tried["nbytes"] > 0:
                tried["rate"] = tried["read"] / seconds
                tried["size"] = tried["nbytes"] / nbytes
        if len(runs) > 1:
            second = _counted(runs[1])
            fewer = tried["requests"] - _mean(second, "requests")
            if fewer > FEWER * tried["requests"]:
                extra = max(0.0, (tried["compute"] - _compute(second)) / fewer)
                tried["per_request"] = min(extra, tried["compute"] / tried["requests"])
        return Timing(**tried)

    def _expected(self, plan: Plan, decoded: int, counted: int) -> tuple[float, float]:
        """What the disk's figures make of the rows that the timed tokens lacked: seconds, bytes."""
        use, model = self.use, self.model
        if use is None:
            return 0.0, 0.0
        seconds = nbytes = 0.0
        paged = model.directory.mixture is not None
        for layer, slots in plan.slots.items():
            steps = []
            for prompt, stop in (
                (self.first, self.second),
                (self.second, min(use.tokens, self.second + decoded)),
            ):
                steps += use.prompt(layer, range(prompt), plan.step, paged)
                steps += use.steps(layer, range(prompt, stop))
            policy = make_policy(model.options.policy, use.rows[layer])
            lacking = miss_counts(steps, use.rows[layer], slots, policy)[-counted:]
            seconds += float(np.mean([self.disk.time(n) for n in lacking]))
            nbytes += float(np.mean([self.disk.bytes_for(n) for n in lacking]))
        return seconds, nbytes


def _counted(walked: ForcedRun) -> list[Step]:
    """Steps behind those that warm up."""
    return walked.steps[min(WARM, len(walked.steps) // 2) :]


def _mean(steps: list[Step], name: str) -> float:
    return float(np.mean([getattr(step.stats, name) for step in steps]))


def _compute(steps: list[Step]) -> float:
    """Seconds of a step that are not waiting."""
    return float(np.median([s.seconds - s.stats.wait_seconds for s in steps if s.stats]))


def _watcher(mlp: SparseMLP, seen: list[np.ndarray]) -> Callable[..., mx.array]:
    """Adds to ``seen`` the rows that each token needs of a paged FFN."""

    def watcher(x: mx.array, *_: Any) -> mx.array:
        seen.extend(mlp.wanted(x))
        return x

    return watcher
