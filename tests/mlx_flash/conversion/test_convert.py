"""Conversion: what comes out, interruptions, what is never overwritten, full disks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils
from support.tiny import make_checkpoint

from mlx_flash import cli, load
from mlx_flash.common import work_directory
from mlx_flash.conversion import convert as convert_module
from mlx_flash.conversion import row_plan
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import ConvertError, DamagedError, ModelError
from mlx_flash.model_directory import writing
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.storage.row_writer import RowFileWriter

DIE = Path(__file__).parents[2] / "support" / "convert_and_die.py"
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def tree(path):
    """Relative name to bytes, of every file below a directory."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def names(path):
    return sorted(file.name for file in path.iterdir())


def bits(array):
    return np.array(array.view(BITS[array.dtype.size]))


class Stop(Exception):
    """Raised by a progress callback to break a conversion off."""


def stop_after(count):
    calls = 0

    def progress(_nbytes, _what):
        nonlocal calls
        calls += 1
        if calls > count:
            raise Stop

    return progress


def break_off(source, out, after=6, **options):
    """Leave an unfinished conversion behind."""
    with pytest.raises(Stop):
        convert(source, out, progress=stop_after(after), **options)
    assert (out.with_name(out.name + ".partial") / "ffn_rows.safetensors").is_file()


def refused(source, out, *flags, capsys, **options):
    """The message of a conversion that is refused, by Python and by the command line alike."""
    with pytest.raises((ConvertError, ModelError, DamagedError)) as caught:
        convert(source, out, **options)
    capsys.readouterr()
    code = cli.main(["convert", "--model", str(source), "--mlx-path", str(out), *flags])
    printed = capsys.readouterr()
    assert code == caught.value.exit_code
    assert printed.err == f"mlx_flash: {caught.value}\n"
    assert printed.out == ""
    return str(caught.value)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Five blocks a layer: a conversion of ``source`` has 48 calls of progress."""
    monkeypatch.setattr(row_plan, "BLOCK_BYTES", 1 << 14)


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "hf", "llama", "bfloat16")


# What comes out


@pytest.mark.parametrize(
    ("family", "dtype", "shards", "cast", "overrides"),
    [
        ("llama", "float32", 1, None, {}),
        ("llama", "float16", 3, None, {}),
        ("llama", "bfloat16", 2, None, {"mlp_bias": True, "attention_bias": True}),
        ("llama", "float32", 1, "float16", {}),
        ("llama", "float32", 2, "bfloat16", {}),
        ("llama", "bfloat16", 1, "float32", {"tie_word_embeddings": True}),
        ("gemma", "bfloat16", 1, None, {}),
        ("phi3", "bfloat16", 2, None, {}),
        ("phi3", "float16", 1, "float32", {}),
        ("phi", "float32", 1, None, {}),
        ("starcoder2", "float16", 1, None, {}),
        ("starcoder2", "bfloat16", 2, None, {"intermediate_size": 163}),
        ("gpt2", "float32", 1, None, {}),
        ("granitemoehybrid", "bfloat16", 1, None, {}),
        ("apertus", "bfloat16", 1, None, {}),
    ],
)
def test_every_weight_again(tmp_path, family, dtype, shards, cast, overrides):
    """Bit for bit, through a dense load of the model directory."""
    source = make_checkpoint(tmp_path / "hf", family, dtype, shards=shards, **overrides)
    out = convert(source, tmp_path / "out", dtype=cast)
    expected = dict(tree_flatten(utils.load_model(source)[0].parameters()))
    found = dict(tree_flatten(load(out, use_flash=False)[0].parameters()))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        weight = weight.astype(getattr(mx, cast)) if cast else weight
        assert found[name].dtype == weight.dtype, name
        assert np.array_equal(bits(found[name]), bits(weight)), name
    resident = mx.load(str(out / "model.safetensors"))
    directory = ModelDirectory(out)
    assert directory.rows.layout.parts[0].dtype == CODES[cast or dtype]
    projections = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "c_fc", "fc1", "fc2")
    assert not any(f"mlp.{p}.weight" in n for n in resident for p in projections)
    assert list(directory.verify()) == []
    if cast:
        assert directory.config["torch_dtype"] == cast


@pytest.mark.parametrize(
    ("family", "projections"),
    [
        ("llama", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
        ("phi3", {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}),
        ("phi", {"up": "fc1", "down": "fc2"}),
    ],
)
def test_rows_hold_what_a_neuron_needs(tmp_path, family, projections):
    """The row file alone, read as any safetensors file: row i is gate i, up i and down column i."""
    source = make_checkpoint(tmp_path / "hf", family, "bfloat16", hidden_size=112, layers=2)
    out = convert(source, tmp_path / "out")
    weights = mx.load(str(source / "model.safetensors"))
    tensors = mx.load(str(out / "ffn_rows.safetensors"))
    assert sorted(tensors) == ["layers.0.rows", "layers.1.rows"]
    layout = json.loads((out / "config.json").read_text())["flash"]["layouts"][0]
    assert [part["name"] for part in layout["parts"]] == list(projections)
    for layer in range(2):
        rows = np.array(tensors[f"layers.{layer}.rows"])
        assert rows.shape == (160, layout["stride"])
        used = np.zeros(layout["stride"], bool)
        for part in layout["parts"]:
            name = f"model.layers.{layer}.mlp.{projections[part['name']]}.weight"
            weight = bits(weights[name])
            if part["name"] == "down":
                weight = weight.T
            elif weight.shape[0] == 320:
                weight = weight[:160] if part["name"] == "gate" else weight[160:]
            where = slice(part["offset"], part["offset"] + 2 * part["shape"][0])
            assert np.array_equal(rows[:, where].copy().view(np.uint16), weight)
            used[where] = True
        assert not used.all()
        assert not rows[:, ~used].any(), "padding is zero"


def test_row_weights_are_in_no_other_file(source, tmp_path):
    out = convert(source, tmp_path / "out")
    weights = mx.load(str(source / "model.safetensors"))
    resident = mx.load(str(out / "model.safetensors"))
    assert weights.keys() - resident.keys() == {
        f"model.layers.{i}.mlp.{part}_proj.weight"
        for i in range(4)
        for part in ("gate", "up", "down")
    }
    assert not resident.keys() - weights.keys()


def test_resident_shards(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 40_000)
    out = convert(source, tmp_path / "out")
    shards = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(shards) >= 4
    assert not (out / "model.safetensors").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    where = {}
    for shard in shards:
        tensors = mx.load(str(shard))
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 40_000
        where |= dict.fromkeys(tensors, shard.name)
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for shard in shards for t in mx.load(str(shard)).values()
    )
    expected = dict(tree_flatten(utils.load_model(source)[0].parameters()))
    found = dict(tree_flatten(load(out, use_flash=False)[0].parameters()))
    assert all(np.array_equal(bits(found[name]), bits(expected[name])) for name in expected)
    assert len(expected) == len(found)


def test_side_files(source, tmp_path):
    for name in ("LICENSE", "README.md", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f'{{"file": "{name}"}}')
    (source / "pytorch_model.bin").write_bytes(b"no")
    (source / "model.safetensors.index.json.bak").write_bytes(b"no")
    (source / "original").mkdir()
    (source / "real").write_text("linked")
    (source / "vocab.txt").symlink_to(source / "real")  # as in the hub's cache
    out = convert(source, tmp_path / "out")
    assert names(out) == [
        "LICENSE",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "ffn_rows.safetensors",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert not (out / "vocab.txt").is_symlink()
    flash = json.loads((out / "config.json").read_text())["flash"]
    assert sorted(flash["files"]) == [
        name for name in names(out) if name not in ("config.json", "ffn_rows.safetensors")
    ]


@pytest.mark.parametrize("name", writing.CALIBRATION)
def test_files_that_calibration_writes_are_not_taken_over(source, tmp_path, name):
    """Hashed with the conversion, they would count as damage once calibrate had replaced them."""
    (source / name).write_text("of the checkpoint")
    out = convert(source, tmp_path / "out")
    assert not (out / name).exists()
    if not name.endswith((".safetensors", ".json")):  # those have to be true to their format
        (out / name).write_text("of mlx_flash calibrate")
    assert name not in ModelDirectory(out).files


def test_tagged_floats_survive(source, tmp_path):
    """JSON has no infinity; transformers writes an object in its place."""
    config = json.loads((source / "config.json").read_text())
    config["time_step_limit"] = [0.0, {"__float__": "Infinity"}]
    (source / "config.json").write_text(json.dumps(config))
    out = convert(source, tmp_path / "out")
    assert ModelDirectory(out).config["time_step_limit"] == [0.0, float("inf")]
    assert '"Infinity"' in (out / "config.json").read_text()
    assert list(ModelDirectory(out).verify()) == []


def test_memory_is_that_of_a_layer(tmp_path, monkeypatch):
    source = make_checkpoint(
        tmp_path / "hf", "llama", "float32", layers=12, hidden_size=256, intermediate_size=1024
    )
    layer = 3 * 4 * 256 * 1024
    blocks = []
    write = RowFileWriter.write

    def watch(self, number, given):
        def each():
            for block in given:
                blocks.append(block.nbytes)
                yield block

        write(self, number, each())

    monkeypatch.setattr(RowFileWriter, "write", watch)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    convert(source, tmp_path / "out")
    assert mx.get_peak_memory() - before < 1.5 * layer
    assert max(blocks) <= row_plan.BLOCK_BYTES
    assert sum(blocks) == 12 * layer


def test_progress_adds_up(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 40_000)

    def total(out):
        calls = []
        convert(source, out, progress=lambda *call: calls.append(call))
        (expected, label), *steps = calls
        assert label == "total"
        assert sum(nbytes for nbytes, _ in steps) == expected
        return expected, steps

    whole, steps = total(tmp_path / "whole")
    assert {f"layer {i}" for i in range(4)} <= {what for _, what in steps}
    stride = ModelDirectory(tmp_path / "whole").rows.layout.stride
    weights = mx.load(str(source / "model.safetensors"))
    assert whole == 4 * 160 * stride + sum(
        w.nbytes for name, w in weights.items() if ".mlp." not in name
    )
    break_off(source, tmp_path / "resumed", after=len(steps) - 3)
    again, steps = total(tmp_path / "resumed")
    assert again == whole
    assert "layer 3 was there" in {what for _, what in steps}


def test_same_input_same_bytes(source, tmp_path):
    """Also from a copy with other times, and with the type named that it has anyway."""
    copy = tmp_path / "elsewhere" / "hf"
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    for file in copy.iterdir():
        os.utime(file, (1, 1))
    first = tree(convert(source, tmp_path / "1"))
    assert tree(convert(source, tmp_path / "2")) == first
    assert tree(convert(copy, tmp_path / "3")) == first
    assert tree(convert(f"{source}/", f"{tmp_path}/4/")) == first
    assert tree(convert(source, tmp_path / "5", dtype="bfloat16")) == first


def test_relative_paths(source, tmp_path, monkeypatch):
    monkeypatch.chdir(source)
    assert convert(".", "../deep/er/out") == Path("../deep/er/out")
    assert tree(tmp_path / "deep/er/out") == tree(convert(source, tmp_path / "out"))
    assert names(tmp_path / "deep/er") == ["out"]


def test_out_inside_the_source(source, tmp_path):
    before = tree(source)
    out = convert(source, source / "out")
    assert tree(out) == tree(convert(source, tmp_path / "out"))
    assert {name: data for name, data in tree(source).items() if "/" not in name} == before


# Interrupted


@pytest.mark.skipif(sys.platform != "linux", reason="forks after MLX is imported")
@pytest.mark.parametrize(
    ("scene", "stride"),
    [
        pytest.param("fresh", 1, marks=pytest.mark.whole),
        pytest.param("force", 1, marks=pytest.mark.whole),
        ("other", 5),
        pytest.param("twice", 5, marks=pytest.mark.whole),
    ],
)
def test_killed_at_every_step(tmp_path, scene, stride):
    new = make_checkpoint(tmp_path / "new", "llama", "bfloat16", layers=2, seed=1)
    old = make_checkpoint(tmp_path / "old", "llama", "bfloat16", layers=2, seed=2)
    (tmp_path / "work").mkdir()
    args = [new, old, tmp_path / "work" / "out", scene, stride]
    done = subprocess.run(
        [sys.executable, DIE, *map(str, args)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    *kills, undisturbed = json.loads(done.stdout)
    assert undisturbed["undisturbed"] == {"out": "new"}
    assert len(kills) * stride > 60
    finished = 0
    for kill in kills:
        assert kill["signal"] == signal.SIGKILL, kill
        assert kill["end"] == {"out": "new"}, kill
        after = kill["after"]
        if scene == "force":
            assert "old" in after.values() or after["out"] == "new", kill
            assert kill["code"] == 0, kill
        elif scene != "twice":
            assert kill["code"] == (99 if "out" in after else 0), kill  # 99: it exists already
        finished += "out" in after and after["out"] != "old"
    assert Counter(kill["end"]["out"] for kill in kills) == {"new": len(kills)}
    assert finished < len(kills) / 5


def test_what_is_there_is_not_done_again(source, tmp_path, monkeypatch):
    undisturbed = tree(convert(source, tmp_path / "undisturbed"))
    taken = []
    take = convert_module.open_checkpoint(source).take.__func__

    def watch(self, name):
        taken.append(name)
        return take(self, name)

    monkeypatch.setattr("mlx_flash.conversion.huggingface.HFCheckpoint.take", watch)
    total = 2 * 160 * 512  # bytes of the rows of two layers
    done = 0

    def progress(nbytes, what):
        nonlocal done
        done += nbytes if what != "total" else 0
        if done > total:
            raise Stop

    with pytest.raises(Stop):
        convert(source, tmp_path / "out", progress=progress)
    assert {name.split(".")[2] for name in taken} == {"0", "1", "2"}
    taken.clear()
    assert tree(convert(source, tmp_path / "out")) == undisturbed
    assert {name.split(".")[2] for name in taken if ".mlp." in name} == {"2", "3"}
    assert len(taken) == len(set(taken))


def test_damage_in_what_is_there_is_noticed(source, tmp_path):
    undisturbed = tree(convert(source, tmp_path / "undisturbed"))
    break_off(source, tmp_path / "out", after=40)
    file = tmp_path / "out.partial" / "ffn_rows.safetensors"
    with open(file, "r+b") as f:
        f.seek(5000)
        f.write(b"oops")
    assert tree(convert(source, tmp_path / "out")) == undisturbed


def test_strange_files_do_not_stay(source, tmp_path):
    """Side files of a source whose side files have changed since."""
    (source / "NOTICE").write_text("once")
    break_off(source, tmp_path / "out")
    (tmp_path / "out.partial" / "NOTICE").write_text("once")
    (tmp_path / "out.partial" / "mlx_flash-writing-0123456789ab.safetensors").write_text("half")
    (source / "NOTICE").unlink()
    out = convert(source, tmp_path / "out")
    assert tree(out) == tree(convert(source, tmp_path / "undisturbed"))
    assert "NOTICE" not in names(out)


def test_killed_while_the_marker_was_written(source, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mlx_flash-writing-0123456789ab").write_text("0123")
    out = convert(source, tmp_path / "out")
    assert tree(out) == tree(convert(source, tmp_path / "undisturbed"))


def test_killed_while_a_file_of_a_model_was_written(source, tmp_path):
    """What is left of it is ours, and no reason to keep the model from being replaced."""
    out = convert(source, tmp_path / "out")
    (out / "mlx_flash-writing-0123456789ab.safetensors").write_text("half")
    convert(source, out, force=True)
    assert tree(out) == tree(convert(source, tmp_path / "undisturbed"))


@pytest.fixture
def small_shards(monkeypatch):
    """So that some are done when a conversion is broken off."""
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 40_000)


def test_another_source_begins_anew(source, tmp_path, small_shards):
    other = make_checkpoint(tmp_path / "other", "llama", "bfloat16", seed=5)
    break_off(source, tmp_path / "out", after=40)
    assert list((tmp_path / "out.partial").glob("model-*.safetensors"))
    assert tree(convert(other, tmp_path / "out")) == tree(convert(other, tmp_path / "2"))


def test_another_type_begins_anew(source, tmp_path, small_shards):
    break_off(source, tmp_path / "out", after=40)
    out = convert(source, tmp_path / "out", dtype="float16")
    assert tree(out) == tree(convert(source, tmp_path / "2", dtype="float16"))


def test_source_changed_since(source, tmp_path, small_shards):
    """The same size, the same name, other numbers: nothing of before may stay."""
    break_off(source, tmp_path / "out", after=40)
    changed = make_checkpoint(tmp_path / "changed", "llama", "bfloat16", seed=5)
    shutil.copyfile(changed / "model.safetensors", source / "model.safetensors")
    assert tree(convert(source, tmp_path / "out")) == tree(convert(source, tmp_path / "2"))


def test_source_cut_while_it_is_read(source, tmp_path, capsys):
    def progress(_nbytes, what):
        if what == "layer 1":
            os.truncate(source / "model.safetensors", 5000)

    with pytest.raises(DamagedError, match=r"tensor model\.\S+ of \S+/hf cannot be read"):
        convert(source, tmp_path / "out", progress=progress)
    assert "is truncated" in refused(source, tmp_path / "out", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_ctrl_c(tmp_path):
    """130, one line, and the same command goes on."""
    source = make_checkpoint(tmp_path / "hf", "llama", "bfloat16")
    slow = (
        "import sys, time\n"
        "from mlx_flash import cli\n"
        "from mlx_flash.conversion import row_plan\n"
        "raw = row_plan.raw\n"
        "def wait(array):\n"
        "    print('reading', flush=True)\n"
        "    while True:\n"
        "        time.sleep(0.05)\n"
        "row_plan.raw = wait\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    command = ["convert", "--model", str(source), "--mlx-path", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # In a background job it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == (
        "mlx_flash: interrupted; run the same command again and it goes on where it stopped\n"
    )
    assert names(tmp_path) == ["hf", "out.partial"]
    assert cli.main(command) == 0
    assert tree(tmp_path / "out") == tree(convert(source, tmp_path / "undisturbed"))
    assert names(tmp_path) == ["hf", "out", "undisturbed"]


def test_two_at_once(source, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "other", "llama", "bfloat16", seed=5)
    messages = []

    def progress(_nbytes, what):
        if what == "layer 2" and not messages:
            messages.append(refused(source, tmp_path / "out", capsys=capsys))
            messages.append(refused(other, tmp_path / "out", "--force", force=True, capsys=capsys))

    convert(source, tmp_path / "out", progress=progress)
    assert len(messages) == 2
    assert all("another conversion is writing" in m and "out.partial" in m for m in messages)
    assert tree(tmp_path / "out") == tree(convert(source, tmp_path / "undisturbed"))


def test_file_system_without_locks(source, tmp_path, monkeypatch):
    def flock(_fd, _how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(work_directory.fcntl, "flock", flock)
    assert ModelDirectory(convert(source, tmp_path / "out"))


# What may be replaced


def test_exists(source, tmp_path, capsys):
    out = convert(source, tmp_path / "out")
    before = tree(tmp_path)
    assert refused(source, out, capsys=capsys) == (
        f"{out} exists; choose another --mlx-path, or replace it with --force"
    )
    assert "exists" in refused(source, source, capsys=capsys)
    assert "exists" in refused(source, tmp_path, capsys=capsys)
    (tmp_path / "empty").mkdir()
    assert "exists" in refused(source, tmp_path / "empty", capsys=capsys)
    assert tree(tmp_path) == before


def test_force(source, tmp_path):
    other = make_checkpoint(tmp_path / "other", "phi", "float32")
    out = convert(other, tmp_path / "out")
    seen = []
    convert(source, out, force=True, progress=lambda *_: seen.append(tree(out)))
    old = tree(convert(other, tmp_path / "old"))
    assert all(state == old for state in seen)
    assert tree(out) == tree(convert(source, tmp_path / "undisturbed"))
    assert names(tmp_path) == ["hf", "old", "other", "out", "undisturbed"]
    (tmp_path / "empty").mkdir()
    assert tree(convert(source, tmp_path / "empty", force=True)) == tree(out)


def test_force_and_a_source_that_fails(source, tmp_path, capsys):
    out = convert(source, tmp_path / "out")
    before = tree(tmp_path)
    missing = tmp_path / "nothing"
    assert "no such model" in refused(missing, out, "--force", force=True, capsys=capsys)
    assert tree(tmp_path) == before


def _file(path):
    path.write_text("mine")


def _foreign(path):
    path.mkdir()
    (path / "letter.txt").write_text("mine")


def _foreign_model(path):
    make_checkpoint(path, "llama")


def _odd_config(path):
    path.mkdir()
    (path / "config.json").write_text('["flash"]')


def _broken_config(path):
    path.mkdir()
    (path / "config.json").write_text('{"flash": ')


def _link(path):
    _foreign(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


def _dangling(path):
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize(
    "make", [_file, _foreign, _foreign_model, _odd_config, _broken_config, _link, _dangling]
)
def test_foreign_is_never_replaced(source, tmp_path, capsys, make):
    out = tmp_path / "out"
    make(out)
    before = tree(tmp_path), names(tmp_path)
    assert "exists" in refused(source, out, capsys=capsys)
    message = refused(source, out, "--force", force=True, capsys=capsys)
    assert "not even with --force" in message
    assert (tree(tmp_path), names(tmp_path)) == before


def test_files_of_others_in_a_model_directory(source, tmp_path, capsys):
    out = convert(source, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    (out / "adapters").mkdir()
    message = refused(source, out, "--force", force=True, capsys=capsys)
    assert "did not write (adapters, notes.txt)" in message
    assert (out / "notes.txt").read_text() == "mine"


def test_source_inside_what_is_replaced(source, tmp_path, capsys):
    out = convert(source, tmp_path / "out")
    shutil.copytree(source, out / "hf")
    message = refused(out / "hf", out, "--force", force=True, capsys=capsys)
    assert "lies in" in message
    assert "lies in" in refused(out, out, "--force", force=True, capsys=capsys)
    assert (out / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("force", [False, True])
def test_somebody_makes_the_target_meanwhile(source, tmp_path, force):
    out = tmp_path / "out"

    def progress(_nbytes, what):
        if what == "layer 3" and not out.exists():
            _foreign(out)

    with pytest.raises(ConvertError, match="exists"):
        convert(source, out, force=force, progress=progress)
    assert names(out) == ["letter.txt"]
    shutil.rmtree(out)
    assert tree(convert(source, out)) == tree(convert(source, tmp_path / "undisturbed"))


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
@pytest.mark.parametrize("make", [_file, _foreign, _foreign_model, _link])
def test_siblings_of_others_stay(source, tmp_path, capsys, name, make):
    """Our names for work in progress, used by somebody else."""
    out = convert(source, tmp_path / "out")
    make(tmp_path / name)
    before = tree(tmp_path)
    message = refused(source, out, "--force", force=True, capsys=capsys)
    assert f"{name} is in the way" in message
    assert tree(tmp_path) == before


def test_last_rename_fails(source, tmp_path, monkeypatch):
    """The old model gets its name back."""
    other = make_checkpoint(tmp_path / "other", "phi", "float32")
    out = convert(other, tmp_path / "out")
    before = tree(out)
    rename = Path.rename

    def refuse(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(ConvertError, match=r"out\.partial failed: Input/output error"):
            convert(source, out, force=True)
    assert tree(out) == before
    assert names(tmp_path) == ["hf", "other", "out", "out.partial"]
    convert(source, out, force=True)
    assert names(tmp_path) == ["hf", "other", "out"]
    assert ModelDirectory(out).config["model_type"] == "llama"


def test_cut_off_between_the_renames(source, tmp_path, capsys):
    """What is left then is put right by any next run, with --force or without."""
    other = make_checkpoint(tmp_path / "other", "phi", "float32")
    out = convert(other, tmp_path / "out")
    before = tree(out)
    break_off(source, out, force=True, after=40)
    out.rename(tmp_path / "out.replaced")
    with pytest.raises(ConvertError, match="exists"):
        convert(source, out)
    assert tree(out) == before
    assert names(tmp_path) == ["hf", "other", "out", "out.partial"]
    out.rename(tmp_path / "out.replaced")
    convert(source, out, force=True)
    assert ModelDirectory(out).config["model_type"] == "llama"
    assert names(tmp_path) == ["hf", "other", "out"]


def test_put_back_without_a_trace(source, tmp_path):
    """Refused after its directory was made: that is taken away again."""
    out = convert(source, tmp_path / "out")
    out.rename(tmp_path / "out.replaced")
    with pytest.raises(ConvertError, match="exists"):
        convert(source, out)
    assert names(tmp_path) == ["hf", "out"]


@pytest.mark.parametrize("count", range(4))
def test_old_model_half_removed(source, tmp_path, monkeypatch, count):
    """It is known as one of ours to the last, so the next run can remove the rest."""
    out = convert(source, tmp_path / "out", dtype="float16")
    unlink, iterdir = Path.unlink, Path.iterdir
    done = []

    def fail(self, **options):
        if self.parent.name == "out.replaced":
            done.append(self.name)
            if len(done) > count:
                raise OSError(errno.EIO, "Input/output error", str(self))
        unlink(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        patch.setattr(Path, "iterdir", lambda self: iter(sorted(iterdir(self))))
        with pytest.raises(ConvertError, match="Input/output error"):
            convert(source, out, force=True)
    assert len(done) == count + 1
    assert (tmp_path / "out.replaced" / "config.json").is_file()
    assert ModelDirectory(out).rows.layout.parts[0].dtype == "BF16"
    convert(source, out, force=True)
    assert names(tmp_path) == ["hf", "out"]


# Where it cannot be written


def test_below_a_file(source, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    message = refused(source, tmp_path / "file" / "a" / "out", capsys=capsys)
    assert f"{tmp_path / 'file'} is no directory" in message
    assert names(tmp_path) == ["file", "hf"]


def test_no_permission(source, tmp_path, capsys, monkeypatch):
    """As root nothing is forbidden, so what the system would say is put in its mouth."""
    (tmp_path / "closed").mkdir()
    access = os.access
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda p, how: "closed" not in str(p) and access(p, how))
        message = refused(source, tmp_path / "closed" / "a" / "out", capsys=capsys)
    assert f"no permission to write in {tmp_path / 'closed'}" in message

    def mkdir(self, *_args, **_kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    message = refused(source, tmp_path / "closed" / "out", capsys=capsys)
    assert "Read-only file system" in message
    assert names(tmp_path / "closed") == []


def test_name_is_missing(source, tmp_path, capsys):
    assert "own name" in refused(source, "/", capsys=capsys)
    assert "own name" in refused(source, f"{tmp_path}/hf/..", capsys=capsys)


def test_disk_too_small(source, tmp_path, capsys, monkeypatch):
    whole = convert(source, tmp_path / "whole")
    need = sum(f.stat().st_size for f in whole.glob("*.safetensors")) + work_directory.MARGIN_BYTES
    usage = shutil._ntuple_diskusage if hasattr(shutil, "_ntuple_diskusage") else None
    free = 54_321_000

    def disk_usage(path):
        assert Path(path).exists()
        return usage(10**12, 10**12 - free, free) if usage else (10**12, 10**12 - free, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    message = refused(source, tmp_path / "a" / "b" / "out", capsys=capsys)
    assert "54.3 MB free" in message
    assert f"{need / 1e6:.1f} MB needed" in message
    assert names(tmp_path) == ["hf", "whole"]
    free = need + 10_000
    convert(source, tmp_path / "a" / "b" / "out")


def test_what_is_there_needs_no_room_again(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    need = 4 * 160 * 512 + work_directory.MARGIN_BYTES
    break_off(source, tmp_path / "out", after=40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=need - 100_000))
    with pytest.raises(ConvertError, match="not enough disk"):
        convert(source, tmp_path / "other")
    convert(source, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: (where, set its size)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk: mounting a tmpfs is not allowed here")

    def resize(nbytes):
        change = ["mount", "-o", f"remount,size={nbytes}", str(disk)]
        subprocess.run(change, check=True, capture_output=True)

    yield disk, resize
    subprocess.run(["umount", "-l", str(disk)], check=True, capture_output=True)


@pytest.mark.parametrize(
    "room", [8_000, 100_000, 340_000, 400_000, 520_000], ids=lambda room: f"{room // 1000}KB"
)
def test_disk_full_in_the_middle(source, tmp_path, capsys, monkeypatch, small_disk, room):
    """In the header, the rows, the resident weights, the tokenizer; and then there is room."""
    disk, resize = small_disk
    resize(room)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10**12))
    message = refused(source, disk / "out", capsys=capsys)
    assert "No space left on device" in message
    assert "make room and run the same command again" in message
    assert not (disk / "out").exists()
    resize(10_000_000)
    assert tree(convert(source, disk / "out")) == tree(convert(source, tmp_path / "undisturbed"))


@pytest.mark.parametrize("after", [0, 1, 9, 23])
def test_write_fails(source, tmp_path, capsys, monkeypatch, after):
    """The same without a disk of its own: the write that fails is one of the row file's."""
    calls = 0
    pwrite = os.pwrite

    def full(*args):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ConvertError, match="No space left on device; make room and run"):
            convert(source, tmp_path / "out")
        assert calls == after + 1
        assert cli.main(["convert", "--model", str(source), "--mlx-path", f"{tmp_path}/out"]) == 2
    assert not (tmp_path / "out").exists()
    assert tree(convert(source, tmp_path / "out")) == tree(convert(source, tmp_path / "2"))
