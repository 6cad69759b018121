"""SmolLM2-135M over RAM budgets: tokens a second and bytes per token, measured and drawn.

Six budgets, from the least that works to everything resident, each in a process of its own, next to
what ``mlx_flash plan`` says of it. The picture names the machine and the day. Offline; about three
minutes on two quiet cores. It needs matplotlib, which ``make test`` installs.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from _shared import OUT, mlx_flash, smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, default=OUT / "ram_curve.png", help="the picture")
    args = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("the picture needs matplotlib: pip install matplotlib")
    model = str(smollm2())
    mlx_flash("plan", "--model", model, "--ram", "400MB")
    mlx_flash(
        "bench", "--model", model, "--ram", "sweep", "--prompt-tokens", "32", "--gen-tokens", "32",
        "--repeats", "2",
        "--json", str(OUT / "ram_curve.json"), "--plot", str(args.plot),
    )  # fmt: skip
    print(f"\nThe picture: {args.plot}")


if __name__ == "__main__":
    main()
