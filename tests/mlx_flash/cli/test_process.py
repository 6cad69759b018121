"""What only a real process shows: interruptions, pipes that close, terminals."""

import os
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
from support.tiny import make_checkpoint

from mlx_flash.conversion.convert import convert

LAYERS, ROWS = 8, 160


def start(*args, **environment):
    """``python -m mlx_flash`` in pipes, which Python buffers unless it is told not to."""
    given = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_flash", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=given | environment,
        # In a background job it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that goes on for longer than any test waits."""
    base = tmp_path_factory.mktemp("endless")
    source = make_checkpoint(
        base / "hf", "llama", layers=2, max_position_embeddings=10**6, eos_token_id=299
    )
    weights = mx.load(str(source / "model.safetensors"))
    head = mx.zeros_like(weights["lm_head.weight"])
    weights["lm_head.weight"] = head  # every token is number 0
    mx.save_safetensors(str(source / "model.safetensors"), weights, {"format": "pt"})
    return convert(source, base / "out")


LONG = ("--prompt", "hello", "--max-tokens", 100_000)


def test_ctrl_c(endless, tmp_path):
    stats = tmp_path / "stats.json"
    process = start("generate", "--model", endless, *LONG, "--stats", stats)
    assert process.stdout.read(20)[:11] == b"==========\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == b"mlx_flash: interrupted\n"
    assert out.endswith(b"\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_inside_of_exec(tmp_path):
    """Imports run a lot of exec; an interrupt there makes CPython die by the signal at its end."""
    (tmp_path / "struck.py").write_text(
        "import sys\n"
        "import importlib\n"
        "cli = importlib.import_module('mlx_flash.cli.main')\n"
        "inspect = importlib.import_module('mlx_flash.cli.inspect')\n"
        "inspect.run_verify = lambda args: exec('raise KeyboardInterrupt')\n"
        "sys.exit(cli.main(['verify', '--model', 'x']))\n"
    )
    command = [sys.executable, "-m", "struck"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"mlx_flash: interrupted\n")


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_reader_goes_away(endless, command):
    """mlx_flash ... | head -1"""
    arguments = LONG if command == "generate" else ()
    process = start(command, "--model", endless, *arguments)
    if command == "generate":
        process.stdout.read(11)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=30) == 1
    assert err == b""
    process.stderr.close()


def test_no_stdout_at_all(endless):
    command = f'exec "{sys.executable}" -m mlx_flash inspect --model "{endless}" >&- <&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True)
    assert done.returncode == 0
    assert done.stderr == b""


def test_terminal_without_the_letters(endless, tmp_path):
    """ASCII output loses letters, not the run."""
    process = start(
        "generate",
        *("--model", endless, "--prompt", "hé", "--max-tokens", 4),
        PYTHONIOENCODING="ascii",
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"Generation: 4 tokens" in out


def test_as_a_module_and_as_a_script(tmp_path):
    for command in ([sys.executable, "-m", "mlx_flash"], [sys.executable, "-c", SCRIPT]):
        done = subprocess.run([*command, "verify", "--model", tmp_path / "x"], capture_output=True)
        assert done.returncode == 2
        assert done.stderr == f"mlx_flash: no such model directory: {tmp_path / 'x'}\n".encode()


SCRIPT = "import sys; from mlx_flash.cli import main; sys.exit(main())"
