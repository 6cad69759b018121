"""``generate``: what comes out, and arguments that cannot be."""

import io
import json
import os
import re
import sys

import mlx.core as mx
import pytest
from mlx_lm import utils
from support.commands import PROMPT, budget, reference
from support.tiny import make_checkpoint

from mlx_flash.cli import generate as generate_module
from mlx_flash.common.platform import current_platform
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory

LAYERS, ROWS = 8, 160
FLASH = {"bytes_read", "requests", "read_seconds", "hits", "misses", "direct"}
EXTRA_FLASH = {
    "unit",
    "lookahead",
    "foretold",
    "useful",
    "predictor",
    "exact",
    "measured",
    "predicted",
    "layer_calls",
    "predict_seconds",
    "manage_seconds",
    "cached_rows",
    "rows",
    "wait_seconds",
    "compute_seconds",
    "forwards",
    "bytes_per_token",
    "kept_layers",
    "streamed_layers",
    "planned_bytes",
}
KEYS = {
    "tokens",
    "text",
    "prompt_tokens",
    "prompt_seconds",
    "generation_tokens",
    "generation_seconds",
    "peak_footprint_bytes",
    "budget_bytes",
    "flash",
}
EXTRA = {"finish_reason"}


def test_figures(model, source, generate, steady):
    least, _ = budget(model, 16)
    stats, out = generate("--ram", least)
    assert stats.keys() == KEYS | EXTRA
    flash = stats["flash"]
    assert flash.keys() == FLASH | EXTRA_FLASH
    tokens, text = reference(source)
    assert stats["tokens"] == tokens
    assert stats["text"] == text
    assert stats["finish_reason"] == "length"
    assert stats["prompt_tokens"] == len(utils.load_tokenizer(source).encode(PROMPT))
    assert stats["generation_tokens"] == 16
    assert stats["budget_bytes"] == least
    assert stats["prompt_seconds"] > 0
    assert stats["generation_seconds"] > 0
    assert 40_000_000 < stats["peak_footprint_bytes"] <= current_platform().peak_process_bytes()
    # mlx-lm computes one token ahead, so the first pass of the 16 is the prompt's.
    assert flash["forwards"] == 15
    assert (flash["unit"], flash["lookahead"]) == ("neuron", False)
    assert (flash["foretold"], flash["useful"]) == (0, 0)
    assert (flash["kept_layers"], flash["streamed_layers"]) == (0, LAYERS)
    layer = ROWS * ModelDirectory(model).rows.layout.stride
    assert abs(flash["bytes_read"] - 15 * LAYERS * layer) <= 2 * layer
    assert flash["bytes_per_token"] == flash["bytes_read"] / 15
    assert flash["requests"] >= 15 * LAYERS - 2
    assert (flash["hits"], flash["misses"]) == (0, 15 * LAYERS * ROWS)
    assert 0 < flash["read_seconds"] < stats["generation_seconds"]
    assert flash["wait_seconds"] + flash["compute_seconds"] == pytest.approx(
        stats["generation_seconds"]
    )
    assert sum(flash["planned_bytes"].values()) <= least
    first, printed, *summary = out.split("=" * 10 + "\n")
    assert first == ""
    assert printed == text + "\n"
    assert re.search(r"^Prompt: \d+ tokens, [\d.]+ tokens-per-sec$", summary[0], re.M)
    assert re.search(r"^Generation: 16 tokens, [\d.]+ tokens-per-sec$", summary[0], re.M)
    assert re.search(r"^Peak memory: [\d.]+ GB of \d+ MB, whole process$", summary[0], re.M)
    assert "hit rate 0.0 %, rows of 0 of 8 layers kept" in summary[0]


def test_figures_with_some_layers_kept(model, source, generate, steady):
    least, _ = budget(model, 16)
    layer = ROWS * ModelDirectory(model).rows.layout.ideal_bytes
    stats, out = generate("--ram", least + 3 * layer)
    flash = stats["flash"]
    kept, streamed = flash["kept_layers"], flash["streamed_layers"]
    assert 0 < kept < LAYERS
    assert kept + streamed == LAYERS
    assert stats["tokens"] == reference(source)[0]
    assert flash["hits"] == 15 * kept * ROWS
    assert flash["misses"] == 15 * streamed * ROWS
    file = ModelDirectory(model).rows.layout.stride * ROWS
    assert abs(flash["bytes_read"] - 15 * streamed * file) <= 2 * file
    assert f"hit rate {100 * kept / LAYERS:.1f} %, rows of {kept} of 8 layers kept" in out


def test_figures_with_all_kept(source, generate, steady):
    stats, out = generate()
    flash = stats["flash"]
    assert stats["budget_bytes"] is None
    assert (flash["bytes_read"], flash["requests"], flash["misses"]) == (0, 0, 0)
    assert flash["hits"] == 15 * LAYERS * ROWS
    assert stats["tokens"] == reference(source)[0]
    assert "0 B read per token" in out


def test_dense(source, generate):
    stats, out = generate("--dense")
    assert stats.keys() == KEYS | EXTRA
    assert stats["flash"] is None
    assert stats["tokens"] == reference(source)[0]
    assert "Flash:" not in out


def test_one_token(source, generate, steady):
    stats, _ = generate(tokens=1)
    assert stats["tokens"] == reference(source, 1)[0]
    assert stats["flash"]["forwards"] == 0
    assert stats["flash"]["bytes_read"] == 0
    assert stats["flash"]["bytes_per_token"] == 0


def test_end_of_text(tmp_path, run):
    """The end token is the last of the tokens, as with mlx-lm, and no text."""
    ended = make_checkpoint(tmp_path / "ended", "llama", layers=2, eos_token_id=0)
    weights = mx.load(str(ended / "model.safetensors"))
    weights["lm_head.weight"] = mx.zeros_like(weights["lm_head.weight"])  # all the same: token 0
    mx.save_safetensors(str(ended / "model.safetensors"), weights, {"format": "pt"})
    out = convert(ended, tmp_path / "out")
    file = tmp_path / "figures.json"
    code, _, err = run("generate", "--prompt", "hello", "--stats", file, model=out)
    assert (code, err) == (0, "")
    stats = json.loads(file.read_text())
    assert (stats["tokens"], stats["text"], stats["finish_reason"]) == ([0], "", "stop")


def test_seed(source, generate):
    flags = ("--temp", 1.5, "--top-p", 0.95, "--top-k", 50, "--seed")
    first, _ = generate(*flags, 7)
    again, _ = generate(*flags, 7)
    other, _ = generate(*flags, 8)
    assert first["tokens"] == again["tokens"] != other["tokens"]
    assert first["tokens"] == reference(source, seed=7, temp=1.5, top_p=0.95, top_k=50)[0]
    largest, _ = generate("--temp", 1.0, "--seed", 2**64 - 1)
    assert largest["generation_tokens"] == 16


def test_top_k_of_more_than_there_are(generate):
    flags = ("--temp", 1.0, "--seed", 3)
    assert generate(*flags, "--top-k", 10**6)[0]["tokens"] == generate(*flags)[0]["tokens"]


def test_prompt_from_stdin(source, generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    stats, _ = generate(prompt="-")
    assert stats["tokens"] == reference(source)[0]


# generate: arguments that cannot be


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n\t "], "the prompt is empty"),
        (["--prompt", "a\udcffb"], "the prompt is not text in UTF-8"),
        (["--max-tokens", "0"], "--max-tokens is at least 1, got 0"),
        (["--max-tokens", "-5"], "--max-tokens is at least 1, got -5"),
        (["--max-tokens", "many"], "invalid int value: 'many'"),
        (["--max-tokens", "600"], "more than the 512 positions that the model was made for"),
        (["--prompt", "many " * 600], "more than the 512 positions that the model was made for"),
        (["--temp", "-1"], "--temp is a number from 0 on, got -1.0"),
        (["--temp", "nan"], "--temp is a number from 0 on, got nan"),
        (["--temp", "inf"], "--temp is a number from 0 on, got inf"),
        (["--top-p", "1.5"], "--top-p is from 0 to 1, got 1.5"),
        (["--top-p", "nan"], "--top-p is from 0 to 1, got nan"),
        (["--top-k", "-1"], "--top-k is not negative, got -1"),
        (["--seed", "-1"], "--seed is from 0 to 2^64 - 1, got -1"),
        (["--seed", str(2**64)], "--seed is from 0 to 2^64 - 1"),
        (["--system-prompt", "be kind"], "--system-prompt needs a chat template"),
        (["--ram", "lots"], "RAM budget 'lots' is not a size"),
        (["--ram", "1.5XB"], "RAM budget '1.5XB' is not a size"),
        (["--ram", ""], "RAM budget '' is not a size"),
        (["--ram", "0"], "a RAM budget is more than 0"),
        (["--ram=-1GB"], "RAM budget '-1GB' is not a size"),
        (["--ram", "500TB"], "is larger than the machine's memory"),
        (["--stats", "/nowhere/to/be/found.json"], "/nowhere/to/be is no directory"),
        (["--stats", "/"], "--stats / is a directory; give a file"),
    ],
)
def test_refused_arguments(run, flags, expected):
    defaults = {"--prompt": "hello", "--max-tokens": "4"}
    given = [text for pair in defaults.items() if pair[0] not in flags for text in pair]
    code, out, err = run("generate", *given, *flags)
    assert code == 2
    assert expected in err
    assert out == ""


def test_stdin_without_text(run, monkeypatch):
    for stdin in (io.StringIO(""), None, io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), "utf-8")):
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, err = run("generate", "--prompt", "-")
        assert code == 2
        assert "the prompt is" in err


def test_prompt_that_has_no_tokens(run, monkeypatch):
    monkeypatch.setattr(generate_module, "_prompt_tokens", lambda _args, _tokenizer: [])
    code, _, err = run("generate", "--prompt", "hello")
    assert code == 2
    assert "has no tokens" in err


def test_chat_template(source, tmp_path, run, generate):
    """Applied by default; one that refuses the messages is an error of one line."""
    plain = len(utils.load_tokenizer(source).encode("hello"))
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    chat = make_checkpoint(tmp_path / "chat", "llama", layers=2)
    (chat / "chat_template.jinja").write_text(template)
    out = convert(chat, tmp_path / "out")
    counts = []
    for flags in ([], ["--ignore-chat-template"]):
        file = tmp_path / "figures.json"
        arguments = ("--prompt", "hello", "--max-tokens", 2, "--stats", file, *flags)
        assert run("generate", *arguments, model=out)[0] == 0
        counts.append(json.loads(file.read_text())["prompt_tokens"])
    assert counts == [plain + 2, plain]
    code, _, err = run("generate", "--prompt", "hello", "--system-prompt", "be", model=out)
    assert code == 2
    assert "chat template refuses the messages (no system here)" in err


def test_stats_over_a_file_and_into_a_device(run, tmp_path):
    file, link, pipe = tmp_path / "stats.json", tmp_path / "link", tmp_path / "pipe"
    file.write_text("old")
    link.symlink_to(file)
    arguments = ("generate", "--prompt", "hello", "--max-tokens", 2, "--stats")
    assert run(*arguments, link)[0] == 0
    assert link.is_symlink()
    assert json.loads(file.read_text())["generation_tokens"] == 2
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert run(*arguments, pipe)[0] == 0
    assert json.loads(os.read(reader, 1 << 16))["generation_tokens"] == 2
    os.close(reader)
    assert pipe.is_fifo()
    assert run(*arguments, "/dev/null")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "stats.json"]
