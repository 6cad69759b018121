"""SmolLM2-135M over RAM budgets: tokens a second and bytes per token, measured and drawn.

From the least that works to everything resident, each budget in a process of its own, next to what
``mlx_flash plan`` says of it. Offline, about three minutes; the curve is in demos/out.
"""

from models import OUT, mlx_flash, smollm2


def main() -> None:
    model, curve = str(smollm2()), OUT / "ram_curve.png"
    mlx_flash("plan", "--model", model, "--ram", "400MB")
    mlx_flash(
        "bench", "--model", model, "--ram", "sweep", "--prompt-tokens", "64", "--gen-tokens", "48",
        "--json", str(OUT / "ram_curve.json"), "--plot", str(curve),
    )  # fmt: skip
    print(f"\nThe curve: {curve}")


if __name__ == "__main__":
    main()
