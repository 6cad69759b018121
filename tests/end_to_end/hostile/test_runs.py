"""What ends a run: NaN, a closed model, a fork, a file written to while in use, a full disk."""

import errno
import os
import shutil
import signal
import sys

import mlx.core as mx
import pytest
from mlx_lm import generate
from support.checkpoints import edit_weights
from support.commands import run_command

from mlx_flash.conversion.convert import convert
from mlx_flash.errors import ClosedError, ConvertError, DamagedError, ModelError
from mlx_flash.model_directory.config import ROW_FILE
from mlx_flash.runtime.load import load

HALF = {"kept_share": 0.5}


def with_nan(name, source):
    def change(weights):
        there = weights[name]
        at = mx.arange(there.size).reshape(there.shape) == 7
        weights[name] = mx.where(at, float("nan"), there).astype(there.dtype)

    edit_weights(source, change)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(source, tmp_path, capsys, name):
    with_nan(name, source)
    out = tmp_path / "out"
    code, _, said = run_command(capsys, "convert", "--model", source, "--mlx-path", out)
    assert code == 2 and f"tensor {name} has 1 of" in said and "--allow-nonfinite" in said
    assert not out.exists()
    allowed = ("--model", source, "--mlx-path", out, "--allow-nonfinite")
    assert run_command(capsys, "convert", *allowed)[0] == 0
    if name == "model.norm.weight":
        code, _, said = run_command(capsys, "generate", "--model", out, "--prompt", "the")
        assert code == 2 and "logits are NaN or infinite" in said


def test_a_closed_model_says_so(model):
    loaded, tokenizer = load(model, **HALF)
    loaded.flash.close()
    with pytest.raises(ClosedError, match="closed; load the model again"):
        generate(loaded, tokenizer, "the", max_tokens=2)
    loaded.flash.close()


@pytest.mark.skipif(sys.platform != "linux", reason="forks after MLX is imported")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_forked_child_says_so(model):
    loaded, tokenizer = load(model, **HALF)
    if (child := os.fork()) == 0:
        signal.alarm(60)  # without the check it waits for threads that it does not have
        try:
            loaded(mx.array([[1]]))
        except ClosedError as error:
            os._exit(0 if "was forked since" in str(error) else 1)
        except BaseException:
            os._exit(2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert generate(loaded, tokenizer, "the", max_tokens=2)  # the parent goes on
    loaded.flash.close()


def test_a_row_file_that_is_written_to_while_in_use(model):
    loaded, tokenizer = load(model, **HALF)
    before = generate(loaded, tokenizer, "the", max_tokens=4)
    file = model / ROW_FILE
    shutil.copy(file, model / "other")
    (model / "other").replace(file)  # a new file under the name does no harm
    assert generate(loaded, tokenizer, "the", max_tokens=4) == before
    loaded.flash.close()
    loaded, tokenizer = load(model, **HALF)
    with open(file, "r+b") as f:
        f.seek(-4096, os.SEEK_END)
        f.write(bytes(4096))
    os.utime(file, ns=(0, 0))
    with pytest.raises(DamagedError, match="written to while it was in use"):
        generate(loaded, tokenizer, "the", max_tokens=4)
    loaded.flash.close()


@pytest.mark.parametrize("where", ["out.partial", "mlx_flash-"])
def test_a_full_disk_is_told_by_the_file_that_was_written(source, tmp_path, monkeypatch, where):
    """That of the output, or the one where the tokenizer is tried first; never the source."""
    copy = shutil.copyfile

    def full(here, there, *_, **__):
        if where not in str(there):
            return copy(here, there)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(here), None, str(there))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ConvertError, match=rf"writing .*{where}.*/tokenizer.* failed: No space"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("variable", ["TMPDIR", "TMP"])
def test_a_temporary_folder_that_is_missing(model, monkeypatch, tmp_path, variable):
    for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=f"{variable} is .*nowhere, which is no directory"):
        load(model)


def test_a_temporary_folder_that_is_full(model, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ModelError, match=r"written: No space left on device; .* make room"):
        load(model)
