"""The command line: figures, flags, exit codes, interruptions; never a traceback."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx_lm import stream_generate, utils
from mlx_lm.sample_utils import make_sampler
from support.platforms import fix_memory
from support.tiny import make_checkpoint

from mlx_flash import cli
from mlx_flash.cli import generate as generate_module
from mlx_flash.common.platform import current_platform
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.load import load
from mlx_flash.runtime.memory_plan import least_budget
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

PROMPT = "the brown fox and the other"
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


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "hf", "llama", layers=LAYERS)


@pytest.fixture(scope="module")
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
        capsys.readouterr()
        try:
            code = cli.main([command, "--model", str(model), *map(str, flags)])
        except SystemExit as exit_:  # argparse
            code = exit_.code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, printed.out, printed.err

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


def budget(model, tokens, prompt=PROMPT):
    """(least, dense) that the planner asks for, as the command line sees it."""
    directory = ModelDirectory(model)
    context = len(utils.load_tokenizer(model).encode(prompt)) + tokens
    options = PagingOptions(context=context)
    needs = memory_requirements(directory, RowReader(directory.rows), options)
    return least_budget(needs, options), needs.dense


def reference(source, tokens=16, prompt=PROMPT, seed=0, **sampling):
    """mlx-lm's own run of the checkpoint: token numbers and text."""
    model, tokenizer = utils.load(str(source))
    mx.random.seed(seed)
    sampler = make_sampler(**sampling)
    found = list(stream_generate(model, tokenizer, prompt, max_tokens=tokens, sampler=sampler))
    return [r.token for r in found], "".join(r.text for r in found)


# generate: what comes out


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


# generate: budgets


def test_budget_too_small(model, source, run, generate, steady):
    """The message has the parts, which add up to the least that works; and that works."""
    code, out, err = run("generate", "--prompt", PROMPT, "--max-tokens", 16, "--ram", "110MB")
    assert code == 2
    assert out == ""
    first, *parts, hint = err.splitlines()
    found = re.fullmatch(
        r"mlx_flash: RAM budget 110 MB is too small for this model; "
        r"the least that works is (\d+) MB:",
        first,
    )
    assert found
    assert hint == "A shorter context needs less."
    listed = {label: float(size) for size, label in (p.strip().split(" MB  ") for p in parts)}
    assert listed["interpreter, libraries, tokenizer"] == 100.0
    assert {"resident weights", "row reader", "2 streaming buffers", "slack"} <= listed.keys()
    assert any(label.startswith("KV cache for ") for label in listed)
    least = int(found[1])
    assert least - 2.2 <= sum(listed.values()) <= least
    stats, _ = generate("--ram", f"{least}MB")
    assert stats["budget_bytes"] == least * 10**6
    assert stats["tokens"] == reference(source)[0]
    exact, _ = budget(model, 16)
    assert generate("--ram", exact)[0]["tokens"] == stats["tokens"]
    code, _, err = run("generate", "--prompt", PROMPT, "--max-tokens", 16, "--ram", exact - 1)
    assert (code, "too small" in err) == (2, True)


def test_budget_larger_than_the_machine(run, steady):
    code, _, err = run("generate", "--prompt", "hello", "--max-tokens", 4, "--ram", "2.1GB")
    assert code == 2
    assert err == ("mlx_flash: RAM budget 2.10 GB is larger than the machine's memory, 2.00 GB\n")


def test_dense_in_a_budget(model, source, run, generate, steady):
    least, dense = budget(model, 16)
    stats, _ = generate("--dense", "--ram", dense)
    assert stats["tokens"] == reference(source)[0]
    assert stats["budget_bytes"] == dense
    code, _, err = run(
        "generate", "--prompt", PROMPT, "--max-tokens", 16, "--dense", "--ram", least
    )
    assert code == 2
    assert "run it without --dense, or with a larger budget" in err


@pytest.mark.parametrize("ram", ["lots", "110MB", 110 * 10**6, "2.1GB", 0])
def test_python_says_the_same(model, run, steady, ram):
    with pytest.raises(BudgetError) as caught:
        load(model, ram=ram, context=20)
    tokens = 20 - len(utils.load_tokenizer(model).encode("hello"))
    code, _, err = run("generate", "--prompt", "hello", "--max-tokens", tokens, "--ram", ram)
    assert code == caught.value.exit_code
    assert err == f"mlx_flash: {caught.value}\n"


# generate: a disk that fails, or has no direct I/O


@pytest.mark.parametrize("calls", [0, 1, 20, 100])
def test_read_error_in_the_middle(model, run, tmp_path, monkeypatch, steady, calls):
    least, _ = budget(model, 16)
    preadv, seen = os.preadv, 0

    def failing(fd, buffers, offset, *flags):
        nonlocal seen
        seen += 1
        if seen > calls + 1:  # the first is the question whether direct I/O works
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr("os.preadv", failing)
    stats = tmp_path / "stats.json"
    code, _, err = run(
        "generate", "--prompt", PROMPT, "--max-tokens", 16, "--ram", least, "--stats", stats
    )
    assert code == 1
    assert len(err.splitlines()) == 1
    found = re.search(r"reading (\S+), layer (\d+), row (\d+), offset (\d+)", err)
    assert found
    assert "Input/output error" in err
    directory = ModelDirectory(model)
    layer = directory.rows.layers[int(found[2])]
    assert found[1] == str(directory.rows.path)
    assert int(found[4]) == layer.offset + int(found[3]) * directory.rows.layout.stride
    assert list(tmp_path.iterdir()) == []


def test_file_cut_while_in_use(model, source, run, tmp_path, monkeypatch, steady):
    copy = convert(source, tmp_path / "copy")
    least, _ = budget(model, 16)
    rows = ModelDirectory(copy).rows
    print_ = print

    def cut(*args, **kwargs):
        os.truncate(rows.path, rows.layers[3].offset)
        print_(*args, **kwargs)

    monkeypatch.setattr(generate_module, "print", cut, raising=False)
    code, _, err = run(
        "generate", "--prompt", PROMPT, "--max-tokens", 16, "--ram", least, model=copy
    )
    assert code == 1
    assert str(rows.path) in err
    assert "layer 3" in err


def test_direct_refused(model, source, generate, monkeypatch, steady):
    open_ = os.open
    flag = getattr(os, "O_DIRECT", 0)

    def refuse(path, flags, *args, **kwargs):
        if flags & flag:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_(path, flags, *args, **kwargs)

    monkeypatch.setattr("os.open", refuse)
    if not flag:
        monkeypatch.setattr("mlx_flash.storage.direct_io.fcntl.fcntl", lambda *_: 1 / 0)
    least, _ = budget(model, 16)
    stats, out = generate("--ram", least)
    assert stats["flash"]["direct"] is False
    assert stats["flash"]["bytes_read"] > 0
    assert stats["tokens"] == reference(source)[0]
    assert "through the page cache (no direct I/O here)" in out


# inspect


def test_inspect(model, run, steady):
    code, out, err = run("inspect", "--json")
    assert (code, err) == (0, "")
    info = json.loads(out)
    directory = ModelDirectory(model)
    assert info["model_type"] == "llama"
    assert info["activation"] == "silu"
    assert info["dtype"] == "F32"
    assert (info["layers"], info["rows"]) == (LAYERS, LAYERS * ROWS)
    assert info["row_bytes"] == directory.rows.layout.stride
    assert info["row_file_bytes"] == (model / "ffn_rows.safetensors").stat().st_size
    assert info["resident_bytes"] == (model / "model.safetensors").stat().st_size
    assert info["parts"] == ["gate", "up", "down"]
    assert info["context"] == 512
    assert info["least_bytes"] < info["dense_bytes"]
    kept = [row["kept_layers"] for row in info["budgets"]]
    assert kept == sorted(kept)
    assert kept[-1] == LAYERS
    assert info["budgets"][0]["ram_bytes"] >= info["least_bytes"]
    layer = ROWS * directory.rows.layout.ideal_bytes
    for row in info["budgets"]:
        assert row["kept_bytes"] == row["kept_layers"] * layer
        assert row["kept_bytes"] + row["streamed_bytes_per_token"] == LAYERS * layer
    code, out, err = run("inspect")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{model}: llama, {info['parameters'] / 1e6:.1f} M parameters, F32"
    assert f"{LAYERS} layers, {LAYERS * ROWS} rows of {info['row_bytes']} bytes" in out
    assert "gate + up + down" in out
    assert len(lines) == 6 + len(info["budgets"])


def test_inspect_counts_parameters(model, source, run):
    weights = mx.load(str(source / "model.safetensors"))
    info = json.loads(run("inspect", "--json")[1])
    assert info["parameters"] == sum(w.size for w in weights.values())


def test_inspect_context(run, steady):
    short = json.loads(run("inspect", "--json", "--context", 10)[1])
    long = json.loads(run("inspect", "--json", "--context", 500)[1])
    assert (short["context"], long["context"]) == (10, 500)
    assert short["least_bytes"] < long["least_bytes"]
    for context in (0, -1):
        code, _, err = run("inspect", "--context", context)
        assert code == 2
        assert f"--context is at least 1, got {context}" in err


# The process: what only a real one shows


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
        "cli.run_verify = lambda args: exec('raise KeyboardInterrupt')\n"
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


def test_bare_arguments(capsys):
    for arguments, code in ([], 2), (["dance"], 2), (["--version"], 0), (["generate", "-h"], 0):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == code
    assert "mlx_flash 0." in capsys.readouterr().out
