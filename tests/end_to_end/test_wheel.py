"""The wheel: whole, nothing besides, and it runs where nothing else of the project is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mlx_flash", "coreml_export")


def run(*command, **how):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the whole tree, tests among it, without a network."""
    path = tmp_path_factory.mktemp("wheel")
    sources = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "out", "fixtures", "golden"
    )
    shutil.copytree(ROOT, path / "tree", ignore=sources)
    assert (path / "tree" / "tests" / "conftest.py").is_file()
    run(
        *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"),
        *("--disable-pip-version-check", "--wheel-dir", path, path / "tree"),
    )
    return next(path.glob("*.whl"))


def test_everything_is_in_it_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert set(names) - info == expected
    assert {
        "mlx_flash/py.typed",
        "mlx_flash/calibration/data/persuasion.txt",
        "mlx_flash/conversion/data/relu-smollm2.safetensors",
    } <= expected
    folders = {Path(name).parent.as_posix() for name in expected if name.endswith(".py")}
    assert {f"{folder}/__init__.py" for folder in folders} <= expected
    assert any(name.endswith("licenses/LICENSE") for name in info)


def test_it_runs_where_it_is_installed(wheel, tmp_path):
    target = tmp_path / "site"
    run(
        *(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"),
        *("--disable-pip-version-check", "--target", target, wheel),
    )
    alone = {**os.environ, "PYTHONPATH": str(target)}
    script = target / "bin" / "mlx_flash"
    said = run(sys.executable, script, "--version", cwd=tmp_path, env=alone)
    assert said == f"mlx_flash {wheel.name.split('-')[1]}\n"
    where = "import mlx_flash, coreml_export; print(mlx_flash.__file__, coreml_export.__file__)"
    found = run(sys.executable, "-c", where, cwd=tmp_path, env=alone).split()
    assert [Path(file).parent.parent for file in found] == [target, target]
