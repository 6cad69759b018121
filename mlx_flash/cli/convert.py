"""``mlx_flash convert``: a checkpoint becomes a model directory."""

from __future__ import annotations

import argparse

from . import options
from .progress import ByteBar

MODES = ("affine", "mxfp4", "mxfp8")
DTYPES = ("float16", "bfloat16", "float32")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "--model", "--hf-path", required=True, help="Hugging Face directory, hub name or GGUF file"
    )
    parser.add_argument("--mlx-path", required=True, help="model directory to make")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="float type to write (default: the checkpoint's)"
    )
    parser.add_argument(
        "--quantize", "-q", action="store_true", help="quantise as mlx_lm.convert does"
    )
    parser.add_argument("--q-bits", type=int, help="bits per weight (default: 4)")
    parser.add_argument("--q-group-size", type=int, help="weights per scale (default: 64)")
    parser.add_argument("--q-mode", default="affine", choices=MODES, help="default: affine")
    parser.add_argument(
        "--quant-predicate", metavar="RECIPE", help="mlx-lm's mixed recipes, such as mixed_4_6"
    )
    parser.add_argument(
        "--dequantize",
        "-d",
        action="store_true",
        help="make floats of a quantised checkpoint or GGUF (default: kept as they are)",
    )
    parser.add_argument(
        "--adapter",
        metavar="NAME",
        help="change the model by an adapter: relu-smollm2, which ships with this package, or a "
        "file (a GGUF is dequantised for it)",
    )
    parser.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="keep weights that are NaN or infinite (default: refused)",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing model directory")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what its user may not expect; returns the exit code."""
    args.interrupted = options.GOES_ON
    from mlx_flash.conversion.convert import convert
    from mlx_flash.performance.inspection import remarks

    with ByteBar("convert") as bar:
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
            allow_nonfinite=args.allow_nonfinite,
            force=args.force,
            progress=bar,
        )
    print(f"Saved {out}")
    for line in remarks(out):
        print(line)
    return 0
