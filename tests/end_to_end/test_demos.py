"""What the demos share: commands in processes of their own, with their progress shown."""

import importlib.util
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

DEMOS = Path(__file__).parents[2] / "demos"


@pytest.fixture(scope="module")
def shared():
    """``demos/_shared.py``, loaded as a demo loads it: with its folder on the path."""
    spec = importlib.util.spec_from_file_location("demos_shared", DEMOS / "_shared.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DEMOS)
        spec.loader.exec_module(module)
    return module


def module_that(tmp_path, monkeypatch, code):
    """Name of a module that a demo may run; it does what the code says."""
    (tmp_path / "pretended.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "pretended"


def test_output_is_shown_and_returned(shared, tmp_path, monkeypatch, capfdbinary):
    module = module_that(tmp_path, monkeypatch, "import sys; print('said', sys.argv[1:])")
    assert shared.run(module, "one", "two words") == "said ['one', 'two words']\n"
    shown = capfdbinary.readouterr().out
    assert b'$ python -m pretended one "two words"' in shown
    assert shown.endswith(b"said ['one', 'two words']\n")


def test_silence_is_called_computing(shared, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shared, "QUIET_SECONDS", 0.1)
    code = "import time; print('a'); time.sleep(1); print('b', end=''); time.sleep(1); print('c')"
    shared.run(module_that(tmp_path, monkeypatch, code))
    shown = capfd.readouterr().out
    _, after = shown.split("a\n", 1)
    dots, rest = after.split("\n", 1)
    assert dots.startswith("  computing ..")
    assert rest == "bc\n"  # in the middle of a line of text nothing is put in


def test_failure_ends_the_demo(shared, tmp_path, monkeypatch):
    module = module_that(tmp_path, monkeypatch, "import sys; print('why'); sys.exit(3)")
    with pytest.raises(SystemExit, match="pretended ended with exit code 3"):
        shared.run(module)
    with pytest.raises(SystemExit, match="why"):
        shared.run(module, "quietly", show=False)


def test_interrupting_is_clean(tmp_path):
    (tmp_path / "pretended.py").write_text("import time; print('begun'); time.sleep(60)")
    # Where the tests run in the background, interrupts are ignored by what they start.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"sys.path.insert(0, {str(DEMOS)!r}); import _shared; "
    demo = subprocess.Popen(
        [sys.executable, "-c", code + "_shared.run('pretended')"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in demo.stdout:
        if line == "begun\n":
            break
    time.sleep(1)  # the parent may still be within Popen
    demo.send_signal(signal.SIGINT)
    # The command that it runs goes on, as it got no signal; it is ended after five seconds.
    out, err = demo.communicate(timeout=30)
    assert demo.returncode == 130
    assert "interrupted" in out and err == ""
