"""The picture of ``mlx_flash bench --plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_flash.errors import UsageError

PLOTS = (".png", ".svg", ".pdf")


def draw(file: Path, found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Tokens a second and bytes per token over RAM."""
    rows = sorted(rows, key=lambda row: row["ram_bytes"])
    ram = [row["ram_bytes"] / 1e6 for row in rows]
    measured = [row["measured"] for row in rows]
    speed = [m["decode_tokens_per_second"] for m in measured]
    sheet = matplotlib_figure().Figure(figsize=(7, 6), layout="constrained")
    above, below = sheet.subplots(2, 1, sharex=True)
    middle = [s["median"] for s in speed]
    ends = [[s["median"] - s["least"] for s in speed], [s["most"] - s["median"] for s in speed]]
    above.errorbar(ram, middle, ends, marker="o", capsize=3, label="measured")
    predicted = [(x, r["predicted"]) for x, r in zip(ram, rows, strict=True) if r.get("predicted")]
    if predicted:
        at, said = zip(*predicted, strict=True)
        speeds = [p["tokens_per_second"] for p in said]
        above.plot(at, speeds, "--", color="grey", label="as planned")
    above.set_ylabel("tokens per second")
    above.set_ylim(bottom=0)
    above.legend()
    below.plot(ram, [m["bytes_per_token"] / 1e6 for m in measured], marker="o", color="tab:red")
    below.set_ylabel("MB read per token")
    below.set_xlabel("RAM budget of the whole process, MB")
    below.set_ylim(bottom=0)
    name = Path(found["settings"]["model"]).name
    sheet.suptitle(f"{name}: {found['machine']}, {found['date']}", fontsize=9)
    sheet.savefig(file)


def matplotlib_figure() -> Any:
    try:
        from matplotlib import figure
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib: pip install matplotlib, or leave --plot out"
        ) from error
    return figure
