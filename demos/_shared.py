"""What the demos share: SmolLM2-135M as model directories, made once, and the command line."""

import os
import selectors
import subprocess
import sys
import time
from pathlib import Path

from smollm2 import smollm2_gguf

OUT = Path(os.path.relpath(Path(__file__).parent / "out"))
SMOLLM2 = OUT / "smollm2-135m"
RELU_SMOLLM2 = OUT / "relu-smollm2-135m"
QUIET_SECONDS = 2.0  # after which a command that prints nothing is said to be computing


def smollm2() -> Path:
    """The model directory of SmolLM2; converted if it is not there."""
    # MLX's CPU back end computes bfloat16 faster than quantised weights; a Mac takes either.
    return _converted(SMOLLM2, "--dtype", "bfloat16", "--dequantize")


def relu_smollm2() -> Path:
    """SmolLM2 with the adapter that gives its FFN zeros (docs/relu_smollm2.md)."""
    return _converted(RELU_SMOLLM2, "--dtype", "float32", "--adapter", "relu-smollm2")


def mlx_flash(*args: str, show: bool = True) -> str:
    """Run a command of ``mlx_flash``; see ``run``."""
    return run("mlx_flash", *args, show=show)


def run(module: str, *args: str, show: bool = True) -> str:
    """Run a command line in a process of its own, so that its peak memory is its own, too.

    Args:
        module: mlx_flash or coreml_export.
        show: print the command and its output as it comes.

    Returns:
        The output. The demo ends where the command fails.
    """
    name = module if module == "mlx_flash" else f"python -m {module}"
    if show:
        print(f"\n$ {name}", *(f'"{a}"' if " " in a else a for a in args), flush=True)
    else:
        print(f"\n({name} {args[0]})", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        output = _follow(process, show)
        code = process.wait()
    except KeyboardInterrupt:  # the same Ctrl-C interrupted the command, too
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
        print("\ninterrupted; a conversion goes on where it stopped when the demo is run again")
        sys.exit(130)
    if code:
        sys.exit(output if not show else f"{name} ended with exit code {code}")
    return output


def _follow(process: subprocess.Popen, show: bool) -> str:
    """Hand on what a process prints; where it prints nothing, say for how long it has computed."""
    began, output, waiting = time.monotonic(), b"", False
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(QUIET_SECONDS):
                if not output or output.endswith(b"\n"):
                    _say_computing(time.monotonic() - began, waiting)
                    waiting = True
                continue
            data = os.read(process.stdout.fileno(), 1 << 16)
            if waiting:
                print("\r\033[K" if sys.stdout.isatty() else "\n", end="", flush=True)
                waiting = False
            if not data:
                return output.decode(errors="replace")
            output += data
            if show:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()


def _say_computing(seconds: float, again: bool) -> None:
    if sys.stdout.isatty():
        print(f"\r  computing, {seconds:.0f} s ", end="", flush=True)
    else:
        print("." if again else "  computing .", end="", flush=True)


def _converted(path: Path, *flags: str) -> Path:
    OUT.mkdir(exist_ok=True)
    if not (path / "config.json").exists():
        mlx_flash("convert", "--model", str(smollm2_gguf()), "--mlx-path", str(path), *flags)
    return path
