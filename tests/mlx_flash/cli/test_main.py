"""Commands and their flags: what is imported for them, what is said where something is missing."""

import argparse
import json
import subprocess
import sys

import mlx_lm
import pytest
from support.checkpoints import edit_config
from support.tiny import make_checkpoint

from mlx_flash import cli
from mlx_flash.cli import convert as convert_command
from mlx_flash.cli import options
from mlx_flash.cli.main import COMMANDS, build_parser
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.dtypes import FLOATS
from mlx_flash.models.quantized_rows import DEFAULTS
from mlx_flash.runtime.memory_requirements import DEFAULT_CONTEXT, default_context

HEAVY = "('mlx', 'mlx_lm', 'transformers', 'torch', 'gguf', 'coremltools', 'tqdm', 'matplotlib')"


def loaded_by(*arguments):
    """Heavy packages that a command line has imported when it ends, and its exit code."""
    script = (
        "import sys\n"
        "from mlx_flash.cli import main\n"
        "try:\n"
        f"    code = main({list(arguments)})\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        f"print('HEAVY', [n for n in {HEAVY} if n in sys.modules], 'numpy' in sys.modules, code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return done.stdout.rsplit("HEAVY ")[-1].strip()


def test_help_imports_nothing_heavy():
    assert loaded_by("--help") == "[] False 0"
    assert loaded_by() == "[] False 2"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_imports_no_mlx(command):
    assert loaded_by(command, "--help") in ("[] False 0", "[] True 0")


@pytest.mark.parametrize(
    "wrong",
    [
        ("generate", "--prompt", "x", "--max-tokens", "0"),
        ("bench", "--ram", "400MB,400MB"),
        ("plan", "--ram", "lots"),
        ("inspect", "--context", "0"),
    ],
)
def test_bad_flags_are_told_before_mlx_is_imported(wrong):
    assert loaded_by(wrong[0], "--model", "x", *wrong[1:]) == "[] True 2"


def test_without_a_command(capsys):
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first == f"mlx_flash: give a command: {', '.join(COMMANDS)}"
    assert second.startswith("Begin with: mlx_flash convert --model ") and "--help" in second


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_arguments(capsys, command):
    assert cli.main([command]) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first == f"mlx_flash: {command} needs {COMMANDS[command].needs}"
    example = second.removeprefix(f"For example: mlx_flash {command} ").split("; ")[0]
    assert example == COMMANDS[command].example
    assert second.endswith(f"; mlx_flash {command} --help lists its flags")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_what_the_parser_takes(command):
    words = COMMANDS[command].example.replace("'Why is the sky blue?'", "why").split()
    args = build_parser().parse_args([command, *words])
    assert args.command == command and callable(args.run)


def test_other_arguments(capsys):
    for arguments, code in (["dance"], 2), (["--version"], 0), (["generate", "-h"], 0):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == code
    assert "mlx_flash 0." in capsys.readouterr().out


def test_choices_are_those_of_the_package():
    assert tuple(DEFAULTS) == convert_command.MODES
    assert set(convert_command.DTYPES) == set(FLOATS)


def test_types_of_flags(tmp_path):
    assert options.size("1.5GB") == 1_500_000_000
    assert options.at_least("--tokens", 1)("3") == 3
    assert options.writable("--json")(str(tmp_path / "x.json")) == tmp_path / "x.json"
    assert options.kv_policy("rotating:64") == "rotating:64"
    for parse, text, says in (
        (options.size, "lots", "RAM budget 'lots' is not a size"),
        (options.at_least("--window", 1, "token"), "0", "--window is at least 1 token, got 0"),
        (options.writable("--json"), str(tmp_path), "is a directory; give a file"),
        (options.kv_policy, "tova", "--kv: KV policy 'tova'; expected one of plain"),
    ):
        with pytest.raises(UsageError, match=says):
            parse(text)
    with pytest.raises(argparse.ArgumentError, match="invalid int value: 'x'"):
        parser = argparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--n", type=options.at_least("--n", 1))
        parser.parse_args(["--n", "x"])


def test_window_and_lookahead(run):
    for flags, says in (
        (["--window", 0], "--window is at least 1 token, got 0"),
        (["--window", 3], "--window needs --policy window"),
        (["--policy", "window", "--lookahead"], "--lookahead needs room that --policy window"),
    ):
        code, out, err = run("generate", "--prompt", "x", *flags)
        assert (code, out) == (2, "") and says in err


# generate, besides what test_generate has


def test_figures_of_a_run_that_its_budget_ends(run, tmp_path, monkeypatch, steady):
    """What was read and made until then is written."""
    real = mlx_lm.stream_generate

    def cut(*args, **kwargs):
        for count, response in enumerate(real(*args, **kwargs)):
            if count == 3:
                raise BudgetError("enough")
            yield response

    monkeypatch.setattr(mlx_lm, "stream_generate", cut)
    stats = tmp_path / "stats.json"
    code, out, err = run(
        "generate", "--prompt", "the", "--max-tokens", 9, "--kv", "plain", "--stats", stats
    )
    assert (code, err) == (2, "mlx_flash: enough\n")
    assert "Generation" not in out
    found = json.loads(stats.read_text())
    assert (found["generation_tokens"], found["finish_reason"]) == (3, None)
    assert len(found["tokens"]) == 3 and found["prompt_tokens"] > 0
    assert found["flash"]["forwards"] >= 2


def test_kv_policies(run, generate, steady, tmp_path):
    plain, _ = generate("--ram", "500MB")
    rotating, _ = generate("--ram", "500MB", "--kv", "rotating:64")
    assert rotating["tokens"] == plain["tokens"]
    code, _, err = run("generate", "--prompt", "x", "--kv", "quantized:8")
    assert code == 2 and "needs heads of a multiple of 32 numbers" in err
    code, _, err = run("generate", "--prompt", "x", "--kv", "quantized:5")
    assert code == 2 and "--kv: KV policy 'quantized:5'; expected quantized:BITS" in err


def test_positions_inside_of_text_config(tmp_path, run):
    """Multimodal models have them there."""
    source = make_checkpoint(tmp_path / "hf", "llama", layers=2)
    edit_config(source, max_position_embeddings=..., text_config={"max_position_embeddings": 40})
    out = convert(source, tmp_path / "out")
    directory = ModelDirectory(out)
    assert directory.positions == default_context(directory) == 40 < DEFAULT_CONTEXT
    code, _, err = run("generate", "--prompt", "x", "--max-tokens", 60, model=out)
    assert code == 2
    assert "are more than the 40 positions that the model was made for" in err
    sizes = ("--ram", "1GB", "--prompt-tokens", 30, "--gen-tokens", 30)
    code, _, err = run("bench", *sizes, model=out)
    assert code == 2
    assert "40 positions that the model was made for, less 2 that the loop begins" in err
