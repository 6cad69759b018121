"""A tiny model on the command line, in this process."""

import json

import pytest
from support.commands import PROMPT, run_command
from support.platforms import fix_memory
from support.tiny import make_checkpoint

from mlx_flash.conversion.convert import convert

LAYERS = 8


@pytest.fixture(scope="package")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "hf", "llama", layers=LAYERS)


@pytest.fixture(scope="package")
def model(source):
    return convert(source, source.with_name("out"))


@pytest.fixture
def steady(monkeypatch):
    """A process and a machine of sizes that do not change from one look to the next."""
    fix_memory(monkeypatch, process=100_000_000, machine=2_000_000_000)


@pytest.fixture
def run(model, capsys):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(command, *flags, model=model):
        return run_command(capsys, command, "--model", model, *flags)

    return run


@pytest.fixture
def generate(run, tmp_path):
    """Generate and return the figures."""

    def generate(*flags, prompt=PROMPT, tokens=16):
        stats = tmp_path / "stats.json"
        stats.unlink(missing_ok=True)
        code, out, err = run(
            "generate", "--prompt", prompt, "--max-tokens", tokens, "--stats", stats, *flags
        )
        assert (code, err) == (0, "")
        assert sorted(p.name for p in tmp_path.iterdir() if "stats" in p.name) == ["stats.json"]
        return json.loads(stats.read_text()), out

    return generate
