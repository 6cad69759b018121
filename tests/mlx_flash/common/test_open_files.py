"""mlx-lm's import asks for 4,096 open files; where it may not have them there is one line."""

import resource
import subprocess
import sys

import pytest

from mlx_flash.common import open_files
from mlx_flash.errors import FlashError

FEW = 1024
PROBE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {few}))
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, {few} + 1))
except ValueError:
    from mlx_flash.cli import main
    sys.exit(main({arguments}))
sys.exit(77)  # a process that may have what it wants
"""


def test_the_limit_is_said(monkeypatch):
    def refuse(_what, wanted):
        assert wanted == (2048, 4096)
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(open_files.resource, "setrlimit", refuse)
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda _: (256, FEW))
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", open_files)
    open_files.check_open_files()  # mlx-lm is here already
    monkeypatch.delitem(sys.modules, "mlx_lm.utils")
    with pytest.raises(FlashError, match=f"may open {FEW} files .* needs 4096; raise it"):
        open_files.check_open_files()


def test_it_asks_for_what_mlx_lm_asks_for(monkeypatch):
    """Nothing else than the import would do."""
    asked = []
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda *given: asked.append(given))
    monkeypatch.delitem(sys.modules, "mlx_lm.utils", raising=False)
    open_files.check_open_files()
    assert asked == [(resource.RLIMIT_NOFILE, (2048, 4096))]


@pytest.mark.parametrize(
    "arguments",
    [["inspect", "--model", "none"], ["convert", "--model", "none", "--mlx-path", "nothing"]],
    ids=["inspect", "convert"],
)
def test_commands(arguments, tmp_path):
    code = PROBE.format(few=FEW, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    if done.returncode == 77:
        pytest.skip("this user may raise any limit")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"mlx_flash: a process may open {FEW} files here")
    assert done.stderr.count("\n") == 1
