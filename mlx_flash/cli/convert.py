"""``mlx_flash convert``: what is printed while a checkpoint becomes a model directory."""

from __future__ import annotations

import argparse

MODES = ("affine", "mxfp4", "mxfp8")


def run_convert(args: argparse.Namespace) -> int:
    """``mlx_flash convert``."""
    args.interrupted = "interrupted; run the same command again and it goes on where it stopped"
    from tqdm import tqdm

    from mlx_flash.conversion.convert import convert
    from mlx_flash.performance.inspection import remarks

    with tqdm(unit="B", unit_scale=True, desc="convert", disable=None) as bar:

        def progress(nbytes: int, what: str) -> None:
            if what == "total":
                bar.reset(total=nbytes)
            else:
                bar.set_postfix_str(what, refresh=False)
                bar.update(nbytes)

        out = convert(
            args.model,
            args.mlx_path,
            dtype=args.dtype,
            quantize=args.quantize,
            q_bits=args.q_bits,
            q_group_size=args.q_group_size,
            q_mode=args.q_mode,
            quant_predicate=args.quant_predicate,
            dequantize=args.dequantize,
            adapter=args.adapter,
            force=args.force,
            progress=progress,
        )
    print(f"Saved {out}")
    for line in remarks(out):
        print(line)
    return 0
