"""The tree keeps its shape: small folders, short modules, few ties between packages."""

import ast
import itertools
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = ("mlx_flash", "coreml_export", "training", "benchmarks", "demos", "tests")
MOST_ENTRIES = 16
MOST_LINES = 400
MOST_PAIRS = 60
# Test modules that are longer: each is one topic.
STILL_LONG = {
    "tests/coreml_export/test_export.py",
    "tests/support/tiny.py",
    "tests/support/tiny_mixtures.py",
    "tests/mlx_flash/calibration/test_calibrate.py",
    "tests/mlx_flash/calibration/test_expert_measure.py",
    "tests/mlx_flash/conversion/test_checkpoint.py",
    "tests/mlx_flash/conversion/test_convert.py",
    "tests/mlx_flash/conversion/test_gguf.py",
    "tests/mlx_flash/conversion/test_quantised.py",
    "tests/mlx_flash/storage/test_linux_aio.py",
    "tests/mlx_flash/storage/test_reader.py",
    "tests/mlx_flash/storage/test_row_file.py",
}


def modules(tree):
    return sorted((ROOT / tree).rglob("*.py"))


def package_of(tree, name):
    """The folder or module right below ``tree`` that a dotted name is in, or None."""
    first, *rest = name.split(".")
    return rest[0] if first == tree and rest else None


def imports(tree, file):
    """Dotted names of everything of ``tree`` that a module imports, relative ones resolved."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from mlx_flash import paging` names a package only in what it takes.
            alone = origin.count(".") == 0
            yield from (f"{origin}.{n.name}" if alone else origin for n in node.names)


def pairs(tree):
    """How many import statements go from one package (a folder of ``tree``) to another."""
    folders = {path.name for path in (ROOT / tree).iterdir() if path.is_dir()}
    found = Counter()
    for file in modules(tree):
        here = file.relative_to(ROOT / tree).parts[0]
        for name in imports(tree, file):
            there = package_of(tree, name)
            if here in folders and there in folders and here != there:
                found[here, there] += 1
    return found


@pytest.mark.parametrize("tree", TREES)
def test_folders_are_small(tree):
    """Entries are Python files, ``__init__`` among them, and folders that hold any."""
    entries = Counter()
    for file in modules(tree):
        for path in itertools.takewhile(lambda p: p != ROOT, [file, *file.parents]):
            entries[path.parent, path] += 1
    sizes = Counter(folder for folder, _ in entries)
    del sizes[ROOT]
    large = {str(f.relative_to(ROOT)): n for f, n in sizes.items() if n > MOST_ENTRIES}
    assert sizes
    assert not large


@pytest.mark.parametrize("tree", TREES)
def test_modules_are_short(tree):
    lines = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in modules(tree)
    }
    long = {file: n for file, n in lines.items() if n > MOST_LINES}
    assert lines
    assert long.keys() <= STILL_LONG, long


def test_packages_have_few_ties():
    found = pairs("mlx_flash")
    assert len(found) <= MOST_PAIRS, sorted(found)
    # The count sees what is there: rows are read from files, and the command line loads models.
    assert {("paging", "storage"), ("cli", "runtime")} <= found.keys()


def test_relative_and_absolute_imports_are_found():
    found = set(imports("mlx_flash", ROOT / "mlx_flash" / "__init__.py"))
    assert {"mlx_flash.errors", "mlx_flash.runtime.load"} <= found
    assert package_of("mlx_flash", "mlx_flash.runtime.load") == "runtime"
    assert package_of("mlx_flash", "mlx.core") is None
    assert package_of("mlx_flash", "mlx_flash") is None
