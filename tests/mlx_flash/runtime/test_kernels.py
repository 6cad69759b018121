"""With a budget, kernels are compiled before the model is in memory."""

import os
import subprocess
import sys

import mlx.core as mx
import pytest
from support.tiny import make_checkpoint

from mlx_flash.conversion.convert import convert

RUN = """
import sys
from pathlib import Path
from mlx_lm import generate
from mlx_flash import load
def kernels():
    return {file.name for file in Path(sys.argv[2]).rglob("*.so")}
model, tokenizer = load(sys.argv[1], ram="2GB", context=64)
before = kernels()
generate(model, tokenizer, "the", max_tokens=3)
print(len(before), sorted(kernels() - before))
"""


@pytest.mark.whole
@pytest.mark.skipif(mx.metal.is_available(), reason="kernels of the CPU back end")
def test_a_first_run_compiles_before_the_budget_is_planned(tmp_path):
    model = convert(make_checkpoint(tmp_path / "hf", "llama", "bfloat16", layers=2), tmp_path / "m")
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(model), str(tmp_path / "tmp")],
        env=os.environ | {"TMPDIR": str(tmp_path / "tmp")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[-2] == "1 []"
