"""A report's files in a model directory: JSON for programs, a table and a picture for people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_flash.common.files import atomic_write, replacing

JSON, TABLE, PLOT = "calibration.json", "calibration.txt", "calibration.png"
NO_PLOT = "the picture needs matplotlib: pip install mlx-flash-rows[training]"
Report = dict[str, Any]


def write(
    path: Path,
    report: Report,
    table: Callable[[Report], str],
    draw: Callable[[Any, Report], None],
) -> None:
    """Write calibration.json, .txt and, where matplotlib is installed, .png.

    Each file is written whole or not at all.

    Args:
        path: model directory.
        report: ready for JSON; "plot" is set in it.
        table: the text of a report.
        draw: draws a report in a matplotlib figure.
    """
    report["plot"] = PLOT if _plot(path / PLOT, report, draw) else NO_PLOT
    for name, text in ((JSON, json.dumps(report, indent=2) + "\n"), (TABLE, table(report))):
        atomic_write(path / name, text)


def _plot(file: Path, report: Report, draw: Callable[[Any, Report], None]) -> bool:
    """Save the picture; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(layout="constrained")
    draw(figure, report)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=100)
    return True


def panels(figure: Any, count: int) -> list[Any]:
    """Axes for ``count`` small pictures, four in a row."""
    columns = min(4, count)
    rows = -(-count // columns)
    figure.set_size_inches(3.6 * columns, 2.8 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes:
        axis.tick_params(labelsize=7)
    return list(axes)
