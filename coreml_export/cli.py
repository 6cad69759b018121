"""``python -m coreml_export MODEL -o OUT``: flags, what is printed, exit codes.

Exit codes: 0 done, 1 the export computes something else than the model or is damaged, 2 a request
that cannot be carried out, 130 interrupted. Heavy imports wait until the arguments are good.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_flash.errors import FlashError, UsageError


def build_parser() -> argparse.ArgumentParser:
    """The argument parser."""
    parser = argparse.ArgumentParser(
        prog="coreml_export", description="Package a model for offline apps with Core ML."
    )
    parser.add_argument(
        "model", help="mlx_flash model directory, Hugging Face directory, or GGUF file"
    )
    parser.add_argument("-o", "--out", help="directory to make")
    parser.add_argument(
        "--profile", default="dense", help="dense, paged, or both with a comma (default: dense)"
    )
    parser.add_argument(
        "--quant",
        default="none",
        choices=["none", "int8", "int4", "palette4"],
        help="int8 per channel; int4 in blocks of 32 (not on the Neural Engine); palette4 is "
        "experimental (default: none, float16)",
    )
    parser.add_argument(
        "--rounding",
        default="calibrated",
        choices=["calibrated", "nearest"],
        help="of int8 and int4: by what layers' inputs are on text, or to the nearest, which is "
        "quicker and worse (default: calibrated)",
    )
    parser.add_argument(
        "--quant-table", metavar="JSON", help="{tensor name pattern: fp16|int8|int4|palette4}"
    )
    parser.add_argument(
        "--context", type=int, help="tokens that the KV cache holds (default: 512, or the model's)"
    )
    parser.add_argument("--target", default="iOS18", help="iOS18 or iOS26 (default: iOS18)")
    parser.add_argument(
        "--units",
        default="cpuAndGPU",
        help="what the app runs on: cpuAndGPU, cpuAndNeuralEngine or all (default: cpuAndGPU)",
    )
    parser.add_argument(
        "--precision",
        choices=["mixed", "fp16"],
        help="mixed sums residuals, norms and logits in float32; fp16 is for the Neural Engine "
        "(default: mixed, with the Neural Engine among --units fp16)",
    )
    parser.add_argument(
        "--predictor",
        default="auto",
        help="paged profile: auto, exact, or trained by mlx_flash calibrate (default: auto)",
    )
    parser.add_argument(
        "--rows", default="fp16", help="paged profile: fp16, or int8 for iOS26 (default: fp16)"
    )
    parser.add_argument(
        "--cache-rows", type=int, help="rows of a layer that the state holds (default: a quarter)"
    )
    parser.add_argument(
        "--part-size", type=float, default=1.0, help="GB that no package goes above (default: 1)"
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run the saved packages against MLX and refuse an export that differs (default: yes)",
    )
    parser.add_argument(
        "--coreml", action="store_true", help="also run Core ML's own prediction (macOS)"
    )
    parser.add_argument(
        "--check",
        metavar="OUT",
        help="measure a finished export instead of making one; its settings are read from it",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        return _check(args) if args.check else _export(args)
    except FlashError as error:
        print(f"coreml_export: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("coreml_export: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"coreml_export: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2


def _settings(args: argparse.Namespace) -> Any:
    from .settings import Settings

    if args.cache_rows is not None and args.cache_rows < 1:
        raise UsageError(f"--cache-rows is {args.cache_rows}; expected 1 or more")
    if not args.part_size > 0:
        raise UsageError(f"--part-size is {args.part_size}; expected a number above 0")
    return Settings.of(
        profiles=tuple(p.strip() for p in args.profile.split(",") if p.strip()),
        quant=args.quant,
        table=Path(args.quant_table) if args.quant_table else None,
        precision=args.precision,
        context=args.context,
        target=args.target,
        units=args.units,
        cache_rows=args.cache_rows,
        predictor=args.predictor,
        rows=args.rows,
        part_bytes=int(args.part_size * 1e9),
        rounding=args.rounding,
    )


def _export(args: argparse.Namespace) -> int:
    if not args.out:
        raise UsageError("say where to write: -o OUT")
    settings = _settings(args)
    from .verification.coreml_device import require_macos

    if args.coreml:
        require_macos()
    from tqdm import tqdm

    from .export import export

    reports: list[Any] = []

    def run(*given: Any) -> None:
        from .verification.verify import verify

        bar.set_postfix_str("parity")
        reports.append(verify(*given, coreml=args.coreml))

    with tqdm(unit="B", unit_scale=True, desc="export", disable=None) as bar:

        def progress(nbytes: int, what: str) -> None:
            if what == "total":
                bar.reset(total=nbytes)
            else:
                bar.set_postfix_str(what, refresh=False)
                bar.update(nbytes)

        out = export(args.model, args.out, settings, run if args.verify else None, progress)
    print(f"Saved {out}")
    for report in reports:
        print(report.markdown())
    return 0


def _check(args: argparse.Namespace) -> int:
    from .bundle import manifest
    from .source.families import describe
    from .source.weights_source import Source
    from .verification.coreml_device import require_macos
    from .verification.verify import measure, stored_by

    if args.coreml:
        require_macos()
    out = Path(args.check)
    content = manifest.read(out)
    manifest.verify(out, content)
    settings = manifest.settings_of(content)
    source = Source(args.model)
    decoder = describe(source)
    stored = stored_by(out, content, source, decoder, settings)
    report = measure(out, content, source, decoder, settings, stored, args.coreml)
    print(report.markdown())
    report.raise_if_failed()
    return 0
