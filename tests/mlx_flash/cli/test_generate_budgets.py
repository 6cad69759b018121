"""``generate`` within a budget, on disks that fail or have no direct I/O."""

import errno
import os
import re

import pytest
from mlx_lm import utils
from support.commands import PROMPT, budget, reference

from mlx_flash.cli import generate as generate_module
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.load import load

LAYERS, ROWS = 8, 160


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
