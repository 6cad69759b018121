"""The table "which model for which RAM" is what the package would do with the real models."""

import itertools
import json
from pathlib import Path

import pytest
from support import tiny, tiny_mixtures

from benchmarks.memory.model_table import Model, table
from benchmarks.memory.placeholder import make
from benchmarks.memory.published_shapes import BITS_4, BITS_16, SHAPES
from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.model_spec import ModelSpec
from mlx_flash.model_directory.directory import ModelDirectory

CONTEXT, PROCESS = 300, 100_000_000
WIDE = {"hidden_size": 128, "intermediate_size": 512}


def tiny_config(source):
    return json.loads((source / "config.json").read_text())


def both(source, tmp_path, stored):
    """The model as it is converted, and as the table sees it."""
    quantize = {"quantize": True} if stored == BITS_4 else {}
    convert(source, tmp_path / "real", dtype="bfloat16", **quantize)
    make(tmp_path / "placeholder", tiny_config(source), stored)
    return [
        Model(ModelDirectory(tmp_path / name), CONTEXT, PROCESS) for name in ("real", "placeholder")
    ]


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        *itertools.product(("llama", "gemma3_text", "mixtral"), (BITS_4, BITS_16)),
        ("relu", BITS_16),  # the table has models with zeros in 16 bits only
    ],
)
def test_placeholder_is_planned_as_the_real_directory(tmp_path, kind, stored):
    source = tmp_path / "source"
    if kind == "mixtral":
        tiny_mixtures.make_mixture(source, kind)
    elif kind == "relu":
        tiny.make_checkpoint(source, "llama", hidden_act="relu", **WIDE)
    else:
        tiny.make_checkpoint(source, kind, **WIDE)
    real, placeholder = both(source, tmp_path, stored)
    assert placeholder.directory.unit == real.directory.unit
    assert placeholder.directory.rows.layouts == real.directory.rows.layouts
    assert placeholder.least == real.least
    assert placeholder.weights == real.weights
    for ram in (real.least, (real.least + real.needs.dense) // 2, 2 * real.needs.dense):
        mine, theirs = placeholder.choice(ram), real.choice(ram)
        assert mine.read == theirs.read
        assert mine.plan == theirs.plan


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_shapes_have_the_parameters_that_were_published(shape):
    found = ModelSpec.of(shape.config, Path(shape.name)).parameters
    if shape.config["model_type"] == "gemma3_text":  # mlx-lm ties its head once it sees weights
        found -= shape.config["vocab_size"] * shape.config["hidden_size"]
    assert found / 1e9 == pytest.approx(shape.parameters, rel=0.01)


def test_a_larger_machine_never_reads_more(tmp_path):
    lines = [line.split("|")[5:8] for line in table(tmp_path).splitlines()[2:]]
    assert len(lines) == len(SHAPES)
    for cells in lines:
        read = [amount(cell.strip()) for cell in cells]
        assert read == sorted(read, reverse=True)


def amount(cell):
    if cell in ("too small", "all held"):
        return float("inf") if cell == "too small" else 0.0
    number, unit = cell.split()
    return float(number) * {"GB": 1e9, "MB": 1e6}[unit]
