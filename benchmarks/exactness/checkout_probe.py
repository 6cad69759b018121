"""What one checkout makes of one model; ``compare_checkouts`` runs this once for each of the two.

It takes a job as JSON on stdin and prints what it found as one JSON line. It uses only the public
interface (``mlx_flash.load`` and the command line), so that it runs with any checkout; PYTHONPATH
says with which one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

TOKENS = 40
PROMPT = "She had been some minutes in the room before she was perceived"
# Reports hold seconds and a picture: only their keys are compared.
MEASURED = ("calibration.json", "calibration.txt", "calibration.png")


def keys_of(value: Any) -> Any:
    """The keys of a JSON value, nested; of a list those of its first entry.

    Numbers in a key ("KV cache for 64 tokens", a layer's number) become "#": they follow the
    memory that a process takes.
    """
    if isinstance(value, dict):
        return {"".join("#" if c.isdigit() else c for c in k): keys_of(v) for k, v in value.items()}
    if isinstance(value, list):
        return [keys_of(value[0])] if value else []
    return None


def hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, of every file in a folder but reports."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in MEASURED
    }


class Probe:
    """Runs commands in this process and notes what they give."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.model = Path(job["out"]) / "model"
        self.found: dict[str, dict[str, Any]] = {"files": {}, "tokens": {}, "keys": {}, "exits": {}}

    def command(self, label: str, *args: str) -> str:
        """Run a command, note its exit code under ``label``; returns what it printed."""
        from mlx_flash import cli

        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                code = cli.main(args)
            except SystemExit as exit_:  # argparse
                code = exit_.code
            except Exception as error:  # is a finding, and the others are still wanted
                code = f"{type(error).__name__}: {error}"
        self.found["exits"][label] = code
        if code:
            print(f"{label}: exit {code}: {errors.getvalue()[-500:]}", file=sys.stderr)
        return out.getvalue()

    def keys(self, label: str, *args: str) -> None:
        """Run a command that prints JSON and note the keys."""
        with contextlib.suppress(ValueError):
            self.found["keys"][label] = keys_of(json.loads(self.command(label, *args)))

    def files(self, label: str, folder: Path) -> None:
        """Note the hashes of a folder's files."""
        named = {f"{label}/{name}": value for name, value in hashes(folder).items()}
        self.found["files"] |= named

    def generate(self, label: str, *flags: str) -> None:
        """Run ``generate`` and note its tokens, its text and the keys of its figures."""
        stats = self.model.with_name("stats.json")
        stats.unlink(missing_ok=True)
        args = ("--prompt", PROMPT, "--max-tokens", str(TOKENS), "--stats", str(stats))
        self.command(label, "generate", "--model", str(self.model), *args, *flags)
        if stats.exists():
            result = json.loads(stats.read_text())
            self.found["tokens"][label] = [result["tokens"], result["text"]]
            self.found["keys"][label] = keys_of(result)

    def load(self, model: Path, options: dict[str, Any]) -> None:
        """Load by ``mlx_flash.load`` and note the greedy tokens."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        import mlx_flash

        label = "load " + ", ".join(f"{k}={v}" for k, v in options.items())
        try:
            loaded, tokenizer = mlx_flash.load(model, **options)
            prompt = mx.array(tokenizer.encode(PROMPT))
            steps = generate_step(prompt, loaded, max_tokens=TOKENS)
            self.found["tokens"][label] = [token for token, _ in steps]
            loaded.flash.close()
        except Exception as error:  # is a finding, and the others are still wanted
            text = str(error).replace(self.job["out"], "OUT")
            self.found["tokens"][label] = f"{type(error).__name__}: {text}"

    def run(self) -> dict[str, dict[str, Any]]:
        """Convert, look at it, generate, calibrate, reorder, and ask for what cannot be done."""
        job, model = self.job, str(self.model)
        convert = ("convert", "--model", job["source"], "--mlx-path", model, *job["convert"])
        self.command("convert", *convert)
        self.files("model", self.model)
        self.command("verify", "verify", "--model", model)
        self.command("inspect", "inspect", "--model", model)
        self.keys("inspect --json", "inspect", "--model", model, "--json")
        self.keys("plan --json", "plan", "--model", model, "--ram", "3GB", "--json")
        self.generate("generate")
        self.generate("generate --dense", "--dense")
        for options in job["loads"]:
            self.load(self.model, options)
        self.refusals(convert)
        if job["calibrate"] is not None:
            self.calibrate()
        if job["reorder"] is not None:
            out = self.model.with_name("reordered")
            flags = ("--out", str(out), "--json", *job["reorder"])
            self.keys("reorder", "reorder", "--model", model, *flags)
            self.files("reordered", out)
        return self.found

    def calibrate(self) -> None:
        """Calibrate a copy; run what it calibrated."""
        copy = self.model.with_name("calibrated")
        shutil.copytree(self.model, copy)
        before = hashes(copy)
        self.command("calibrate", "calibrate", "--model", str(copy), *self.job["calibrate"])
        self.found["files"] |= {
            f"calibrated/{name}": value
            for name, value in hashes(copy).items()
            if before.get(name) != value
        }
        if (report := copy / "calibration.json").exists():
            self.found["keys"]["calibration.json"] = keys_of(json.loads(report.read_text()))
        for options in self.job["calibrated_loads"]:
            self.load(copy, options)

    def refusals(self, convert: tuple[str, ...]) -> None:
        """Commands that end with an error: the exit codes tell which kind."""
        model = str(self.model)
        generate = ("generate", "--model", model, "--prompt", PROMPT)
        self.command("convert over it", *convert)
        self.command("generate --ram 1MB", *generate, "--ram", "1MB")
        self.command("generate --ram 1XB", *generate, "--ram", "1XB")
        self.command("generate, no prompt", "generate", "--model", model, "--prompt", " ")
        self.command("plan --ram 1MB", "plan", "--model", model, "--ram", "1MB")
        self.command("inspect, no model", "inspect", "--model", model + "-missing")
        self.command("no command")
        damaged = self.model.with_name("damaged")
        shutil.copytree(self.model, damaged)
        with (damaged / "ffn_rows.safetensors").open("r+b") as f:
            f.seek(-1, 2)
            last = f.read(1)[0]
            f.seek(-1, 2)
            f.write(bytes([last ^ 1]))
        self.command("verify, damaged", "verify", "--model", str(damaged))
        shutil.rmtree(damaged)


if __name__ == "__main__":
    print(json.dumps(Probe(json.load(sys.stdin)).run()))
