"""The README is short, its figures are those of docs/, its table is what the script prints."""

import re
import subprocess
import sys

from support.documents import ROOT, blocks, prose

from mlx_flash.models.families import FAMILIES
from mlx_flash.models.mixtures import MIXTURES

README = ROOT / "README.md"
LINES, WORDS = 150, 1300
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-\d+)?")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(), re.M | re.S)[1]


def test_it_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= LINES
    assert len(text.split()) <= WORDS


def test_what_was_not_measured_stands_near_the_top():
    assert "No Mac was measured" in "\n".join(README.read_text().splitlines()[:15])


def test_every_figure_is_in_measurements():
    known = set(NUMBER.findall((ROOT / "docs" / "measurements.md").read_text()))
    missing = {n for n in NUMBER.findall(section("Measured")) if n not in known}
    assert not missing


def test_counts_of_families():
    text = prose(README)
    assert f"{len(FAMILIES)} dense families" in text
    assert f"{len(MIXTURES)} families of mixtures" in text


def test_table_of_models_is_what_the_script_prints():
    command = [sys.executable, "-m", "benchmarks.memory.model_table"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    shown = [line for line in section("Which model for your RAM").splitlines() if "|" in line]
    assert shown == table, "run: python -m benchmarks.memory.model_table"


def test_python_example_is_short():
    code = next(block.code for block in blocks(README) if block.language == "python")
    assert len(code.splitlines()) <= 10
