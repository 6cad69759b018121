"""Every benchmark can be imported and says how it is run."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Programs that a benchmark starts and gives its job to: they have no flags.
CHILDREN = {"benchmarks.comparison.other_programs", "benchmarks.exactness.checkout_probe"}
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "benchmarks").glob("*/*.py")
    if file.parent.name != "out"
)
COMMANDS = [
    name
    for name in MODULES
    if "__main__" in (ROOT / name.replace(".", "/")).with_suffix(".py").read_text()
    and name not in CHILDREN
]


@pytest.mark.parametrize("name", [name for name in MODULES if name not in COMMANDS])
def test_it_is_imported(name):
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("name", COMMANDS)
def test_it_answers_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_readme_has_its_command(name):
    assert name in (ROOT / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_its_docstring_has_its_command(name):
    assert f"python -m {name}" in importlib.import_module(name).__doc__
