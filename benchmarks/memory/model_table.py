"""Which model for which RAM: what budgets hold of published shapes, and what a token reads.

    python -m benchmarks.memory.model_table

Nothing is loaded and nothing measured: the package's own plan is asked, on directories that have a
published model's shapes and no weights (``placeholder``). Prints the table of the README.

What is assumed stands below the table. Of a mixture's experts each is taken to be chosen equally
often, and of a model with zeros every cached row to be as useful as any other: real text is more
uneven, so caches hit more often and less is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_flash.errors import BudgetError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import mixtures
from mlx_flash.predictors.selection import select
from mlx_flash.runtime.memory_plan import Plan, least_budget, plan_for
from mlx_flash.runtime.memory_requirements import MemoryRequirements, memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

from .placeholder import make
from .published_shapes import SHAPES, Shape

CONTEXT = 4096  # tokens
PROCESS = 150_000_000  # bytes of interpreter, libraries and tokenizer
MEMORIES = (8, 16, 32)  # GB that a machine has
SHARE = 0.75  # of a machine's memory that is given to the model, as `load` does without `ram`


@dataclass(frozen=True)
class Choice:
    """What a budget makes of a model.

    Args:
        plan: None where the budget is below the least.
        read: bytes that a decoded token reads from flash.
    """

    plan: Plan | None
    read: float


class Model:
    """A published shape and what it needs of memory.

    Args:
        directory: made by ``placeholder.make``, or a real model directory.
        active: share of the FFN's neurons that fire for a token.
    """

    def __init__(
        self, directory: ModelDirectory, context: int, process: int, active: float | None = None
    ) -> None:
        self.directory, self.active = directory, active
        self.options = PagingOptions(context=context)
        reader = RowReader(directory.rows)
        try:
            found = memory_requirements(directory, reader, self.options, select(directory))
        finally:
            reader.close()
        self.needs: MemoryRequirements = dataclasses.replace(found, process=process)

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.needs.resident + sum(self.needs.layers)

    @property
    def least(self) -> int:
        """The smallest budget that works, bytes."""
        return least_budget(self.needs, self.options)

    def choice(self, ram: int) -> Choice:
        """What ``ram`` bytes make of it."""
        try:
            plan = plan_for(self.needs, self.options.replace(ram=ram), ram)
        except BudgetError:
            return Choice(None, 0.0)
        return Choice(plan, self._read(plan))

    def _read(self, plan: Plan) -> float:
        read = float(sum(self.needs.layers[i] for i in plan.streamed))
        for layer, slots in plan.slots.items():
            rows = self.directory.rows.layers[layer].rows
            asked = self._asked(rows)
            read += asked * (1 - slots / rows) * self.needs.paging.slots[layer]
        return read

    def _asked(self, rows: int) -> float:
        """How many rows of a layer a token asks for."""
        if self.directory.mixture:
            return mixtures.expert_counts(self.directory.config, self.directory.mixture)[1]
        return rows if self.active is None else self.active * rows


def models(folder: Path, shapes: tuple[Shape, ...] = SHAPES) -> Iterator[tuple[Shape, Model]]:
    """Each shape with its needs; placeholders are made in ``folder``."""
    for shape in shapes:
        directory = ModelDirectory(make(folder / shape.name, shape.config, shape.stored))
        yield shape, Model(directory, CONTEXT, PROCESS, shape.active)


def gigabytes(nbytes: float) -> str:
    """Bytes with two digits that count."""
    size = nbytes / 1e9
    if size < 1:
        return f"{1000 * size:.0f} MB" if size < 0.1 else f"{size:.2f} GB"
    return f"{size:.1f} GB" if size < 100 else f"{size:.0f} GB"


def table(folder: Path, shapes: tuple[Shape, ...] = SHAPES) -> str:
    """The table as Markdown."""
    heads = ["model", "stored", "weights", "least RAM", *(f"{n} GB Mac" for n in MEMORIES)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for shape, model in models(folder, shapes):
        cells = [shape.name, shape.stored, gigabytes(model.weights), gigabytes(model.least)]
        for memory in MEMORIES:
            choice = model.choice(int(SHARE * memory * 1e9))
            if choice.plan is None:
                cells.append("too small")
            else:
                cells.append(gigabytes(choice.read) if choice.read else "all held")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(Path(folder)))
    print(
        f"\nRead from flash for each token, with {100 * SHARE:.0f} % of the machine's memory as the"
        f" RAM budget\nand a context of {CONTEXT} tokens. Planned, not measured."
    )


if __name__ == "__main__":
    main()
