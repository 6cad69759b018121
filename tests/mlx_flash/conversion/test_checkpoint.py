"""Sources: what is wrong with them is said in one message, and nothing is left behind."""

import json
import os
import shutil
import struct
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import pytest
from mlx_lm import utils
from support.checkpoints import edit_config, edit_weights
from support.tiny import make_checkpoint

from mlx_flash import cli, load
from mlx_flash.common import json_reader
from mlx_flash.conversion.checkpoint import RequestedFormat
from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.huggingface import HFCheckpoint
from mlx_flash.conversion.open_checkpoint import open_checkpoint
from mlx_flash.errors import DamagedError, FlashError, ModelError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.families import FAMILIES
from mlx_flash.models.mixtures import MIXTURES


def refused(source, tmp_path, capsys, code=2, **options):
    """The message of a source that is refused, by Python and by the command line alike."""
    here = sorted(tmp_path.iterdir())
    out = tmp_path / "made" / "out"
    with pytest.raises(FlashError) as caught:
        convert(source, out, **options)
    assert type(caught.value) is (DamagedError if code == 1 else ModelError)
    capsys.readouterr()
    flags = [text for key, value in options.items() for text in (f"--{key}", value)]
    found = cli.main(["convert", "--model", str(source), "--mlx-path", str(out), *flags])
    printed = capsys.readouterr()
    assert found == caught.value.exit_code == code
    assert printed.err == f"mlx_flash: {caught.value}\n"
    assert "Traceback" not in printed.err
    assert sorted(tmp_path.iterdir()) == here
    return str(caught.value)


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """No network: what the hub is asked for; ``answer`` is a path or an exception."""

    class Hub:
        asked = ()
        answer = None

        def __call__(self, name, **options):
            self.asked = (*self.asked, name)
            self.options = options
            if isinstance(self.answer, Exception):
                raise self.answer
            assert self.answer, f"the hub was asked for {name}"
            return str(self.answer)

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


# Where there is none


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "./models/llama",
        "../models/llama",
        "/models/llama",
        "models/llama/7b",
        "models/llama/",
        "~/models",
        "models/llama.gguf",
        "llama.gguf",
        "a b/c",
        "nul\0l/x",
        "x" * 5000,
    ],
)
def test_no_such_model(tmp_path, capsys, monkeypatch, hub, name):
    """Whatever looks like a path, or like nothing, is not looked for on the net."""
    monkeypatch.chdir(tmp_path)
    message = refused(name, tmp_path, capsys)
    assert "no such model" in message
    assert name[:100] in message or repr(name) in message
    assert hub.asked == ()


@pytest.mark.parametrize(
    "error",
    [
        OSError("Name or service not known"),
        ValueError("Repo id must be in the form"),
        huggingface_hub.errors.LocalEntryNotFoundError("cannot find the files"),
        RuntimeError("peer closed connection"),
    ],
)
def test_not_on_the_hub(tmp_path, capsys, hub, error):
    hub.answer = error
    message = refused("models/llama", tmp_path, capsys)
    assert "'models/llama' is not a directory here and could not be fetched" in message
    assert str(error) in message


def test_from_the_hub(source, tmp_path, hub):
    hub.answer = source
    out = convert("org/model-1.5B_it", tmp_path / "out")
    assert hub.asked == ("org/model-1.5B_it",)
    patterns = hub.options["allow_patterns"]
    assert {"*.json", "model*.safetensors", "*.jinja", "LICENSE*"} <= set(patterns)
    assert not any("bin" in pattern for pattern in patterns)
    assert ModelDirectory(out).config["flash"]["source"] == "model-1.5B_it"


def test_a_directory_here_is_not_asked_of_the_hub(source, tmp_path, hub, monkeypatch):
    shutil.copytree(source, tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    convert("org/model", tmp_path / "out")
    assert hub.asked == ()


def test_file_of_another_kind(source, tmp_path, capsys):
    message = refused(source / "model.safetensors", tmp_path, capsys)
    assert "is a file but no .gguf" in message
    assert "no such model directory" in refused("/dev/null", tmp_path, capsys)


def test_letters_of_gguf(tmp_path, capsys):
    (tmp_path / "MODEL.GGUF").write_bytes(b"GGML")
    assert "not a GGUF file" in refused(tmp_path / "MODEL.GGUF", tmp_path, capsys)


def test_unknown_dtype(source):
    with pytest.raises(ModelError, match="'int8' is not one of float16, bfloat16, float32"):
        open_checkpoint(source, RequestedFormat("int8"))


# config.json


def test_no_config(source, tmp_path, capsys):
    (source / "config.json").unlink()
    assert f"{source} has no config.json" in refused(source, tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "is not JSON"),
        (b'{"model_type": "llama"', "is not JSON"),
        (b"\xff\xfe\x00{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'["llama"]', "holds list, expected a JSON object"),
        (b"null", "holds NoneType, expected a JSON object"),
        (b'"flash"', "holds str, expected a JSON object"),
    ],
)
def test_config_is_no_config(source, tmp_path, capsys, text, expected):
    (source / "config.json").write_bytes(text)
    message = refused(source, tmp_path, capsys)
    assert expected in message
    assert str(source / "config.json") in message


@pytest.mark.parametrize("model_type", [..., None, "gpt5", "mixtral9", 7, ["llama"], {"a": 1}])
def test_unknown_family(source, tmp_path, capsys, model_type):
    edit_config(source, model_type=model_type)
    message = refused(source, tmp_path, capsys)
    assert str(source / "config.json") in message
    if not isinstance(model_type, list | dict):
        assert f"model_type {None if model_type is ... else model_type!r}" in message
        assert all(family in message for family in FAMILIES)
        assert all(family in message for family in MIXTURES)


def test_family_of_other_tensors(source, tmp_path, capsys):
    """Known, and a mixture, but the tensors are a dense model's."""
    edit_config(source, model_type="mixtral")
    message = refused(source, tmp_path, capsys)
    assert f"the tensors of {source} do not fit config.json" in message
    assert "missing: model.layers.0.block_sparse_moe" in message
    assert "not expected: model.layers.0.mlp.gate_proj.weight" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_act": "mish"}, "hidden_act of this llama model is 'mish'; expected one of relu"),
        ({"hidden_act": ["silu"]}, "hidden_act of this llama model is ['silu']"),
        ({"text_config": "none"}, "config.json has a value of the wrong kind"),
        ({"flash": {}}, "is a model directory already"),
        ({"model_file": "my_model.py"}, "brings its own code (my_model.py)"),
        (
            {"quantization": {"bits": 4, "group_size": 64}},
            "config.json says 4 bits in groups of 64 (affine), but no tensor is quantised",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantised by 'fp8' (quantization_config in config.json), which is not read",
        ),
        (
            {"text_config": {"quantization_config": {"a": 1}}},
            "quantised by None (quantization_config in config.json), which is not read",
        ),
    ],
)
def test_config_that_is_refused(source, tmp_path, capsys, changes, expected):
    edit_config(source, **changes)
    assert expected in refused(source, tmp_path, capsys)


def test_quantised_by_a_file_of_its_own(source, tmp_path, capsys):
    (source / "hf_quant_config.json").write_text("{}")
    assert "is quantised (hf_quant_config.json)" in refused(source, tmp_path, capsys)


def test_converted_already(source, tmp_path, capsys):
    out = convert(source, tmp_path / "once")
    assert f"{out} is a model directory already" in refused(out, tmp_path, capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": ...},
        {"num_hidden_layers": ...},
        {"vocab_size": ...},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"num_attention_heads": -4},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": 2.5},
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": "wide"},
        {"hidden_size": 2**40},
        {"hidden_size": None},
        {"intermediate_size": 0},
        {"intermediate_size": {}},
        {"vocab_size": 0},
        {"head_dim": -16},
        {"rms_norm_eps": "small"},
        {"rope_theta": "long"},
        {"rope_scaling": {"type": "unheard-of", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"rope_scaling": "linear"},
    ],
    ids=str,
)
def test_config_that_makes_no_model(source, tmp_path, capsys, changes):
    """Absurd values: an error at once, not a traceback, and not a model that cannot be loaded."""
    edit_config(source, **changes)
    message = refused(source, tmp_path, capsys)
    assert "config.json" in message
    assert len(message) < 3000


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "gemma3_text", "lfm2", "openelm"])
def test_config_with_nothing_in_it(tmp_path, capsys, model_type):
    source = make_checkpoint(tmp_path / "hf", model_type, layers=2)
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert "config.json" in refused(source, tmp_path, capsys)


# Files of weights


def test_no_weights(source, tmp_path, capsys):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    message = refused(source, tmp_path, capsys)
    assert "has no model*.safetensors" in message
    assert "save the checkpoint as safetensors first" in message


@pytest.fixture
def sharded(tmp_path):
    return make_checkpoint(tmp_path / "hf", "llama", "bfloat16", layers=2, shards=3)


def test_missing_shards(sharded, tmp_path, capsys):
    for n in (1, 3):
        (sharded / f"model-0000{n}-of-00003.safetensors").unlink()
    message = refused(sharded, tmp_path, capsys)
    assert "lacks 2 of 3 shards" in message
    assert "model-00001-of-00003.safetensors, model-00003-of-00003.safetensors" in message


def test_missing_shard_and_index(sharded, tmp_path, capsys):
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "missing: model.layers." in refused(sharded, tmp_path, capsys)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["b"]}}',
        '{"weight_map": {"a": "b", "c": 1}}',
    ],
)
def test_broken_index(sharded, tmp_path, capsys, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    message = refused(sharded, tmp_path, capsys)
    assert "model.safetensors.index.json is not a safetensors index" in message


def test_empty_index(sharded, tmp_path, capsys):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert "has no model*.safetensors" in refused(sharded, tmp_path, capsys)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -4096])
def test_truncated_weights(source, tmp_path, capsys, keep):
    file = source / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    message = refused(source, tmp_path, capsys, code=1)
    assert f"{file} is truncated" in message


def _safetensors(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x80\x02}q\x00." * 100, 1),
        (b"\xff" * 1000, 1),
        (bytes(1000), 1),
        (_safetensors(b"[1, 2]"), 1),
        (_safetensors(b"{" * 5000), 1),
        (_safetensors({"a": 1}), 1),
        (_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}), 1),
        (_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000]}}), 1),
        (_safetensors({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}), 1),
        (_safetensors({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}), 1),
        (_safetensors({"a": {"shape": [1], "data_offsets": [0, 4]}}), 1),
        (_safetensors({"a": {"dtype": 5, "shape": [1], "data_offsets": [0, 4]}}), 1),
        (_safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}), 1),
        (_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), 1),
        (_safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}), 2),
    ],
)
def test_garbage_weights(source, tmp_path, capsys, data, code):
    (source / "model.safetensors").write_bytes(data)
    message = refused(source, tmp_path, capsys, code=code)
    assert str(source) in message


# Tensors


def test_tensors_missing_extra_misshapen(source, tmp_path, capsys):
    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        del weights["model.norm.weight"]
        weights["model.layers.0.mlp.side_proj.weight"] = mx.zeros((4, 4))
        weights["model.layers.0.mlp.down_proj.weight"] = mx.zeros((160, 64))

    edit_weights(source, change)
    message = refused(source, tmp_path, capsys)
    assert message.splitlines() == [
        f"the tensors of {source} do not fit config.json:",
        "  missing: model.layers.1.mlp.up_proj.weight",
        "  missing: model.norm.weight",
        "  not expected: model.layers.0.mlp.side_proj.weight",
        "  shape of model.layers.0.mlp.down_proj.weight: (160, 64), expected (64, 160)",
    ]


def test_many_offenders(source, tmp_path, capsys):
    edit_config(source, intermediate_size=96, num_hidden_layers=20)
    lines = refused(source, tmp_path, capsys).splitlines()
    missing, misshapen = 18 * 9, 2 * 3
    assert len(lines) == 22
    assert lines[-1] == f"  and {missing + misshapen - 20} more"


def test_sanitize_that_fails(tmp_path, capsys):
    """mlx-lm's own renaming looks for a tensor that is not there."""
    source = make_checkpoint(tmp_path / "hf", "granitemoehybrid", layers=2)
    name = "model.layers.0.shared_mlp.output_linear.weight"
    edit_weights(source, lambda weights: weights.pop(name))
    message = refused(source, tmp_path, capsys)
    assert "do not fit config.json" in message
    assert name in message or "model.layers.0.mlp.down_proj.weight" in message


def test_types_mixed_in_the_ffn(source, tmp_path, capsys):
    def change(weights):
        name = "model.layers.1.mlp.gate_proj.weight"
        weights[name] = weights[name].astype(mx.float32)

    edit_weights(source, change)
    message = refused(source, tmp_path, capsys)
    assert "FFN weights are of several types (BF16, F32); choose one with --dtype" in message
    directory = ModelDirectory(convert(source, tmp_path / "out", dtype="float32"))
    assert directory.rows.layout.parts[0].dtype == "F32"


def test_types_mixed_elsewhere_stay(source, tmp_path):
    """Norms in float32 beside rows in bfloat16 are usual."""

    def change(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"].astype(mx.float32)

    edit_weights(source, change)
    out = convert(source, tmp_path / "out")
    assert mx.load(str(out / "model.safetensors"))["model.norm.weight"].dtype == mx.float32


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "complex64"])
def test_types_that_are_no_floats(source, tmp_path, capsys, dtype):
    def change(weights):
        name = "model.layers.1.mlp.gate_proj.weight"
        weights[name] = weights[name].astype(getattr(mx, dtype))

    edit_weights(source, change)
    message = refused(source, tmp_path, capsys)
    assert f"tensor model.layers.1.mlp.gate_proj.weight is {dtype}" in message
    assert f"is {dtype}" in refused(source, tmp_path, capsys, dtype="float32")


def test_float8(source, tmp_path, capsys):
    """Eight-bit floats without a word in config.json."""
    file = source / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = header["model.layers.0.mlp.up_proj.weight"]
    entry |= {"dtype": "F8_E4M3", "shape": [160, 128]}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    assert "model.layers.0.mlp.up_proj.weight" in refused(source, tmp_path, capsys)


def test_too_large_for_float16(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32", layers=2)

    def change(weights):
        weights["model.norm.weight"] = mx.full((64,), 7e4)

    edit_weights(source, change)
    with pytest.raises(ModelError, match=r"model\.norm\.weight has values that float16 cannot"):
        convert(source, tmp_path / "out", dtype="float16")
    convert(source, tmp_path / "out", dtype="bfloat16")


def test_infinities_are_refused_or_stay(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32", layers=2)

    def change(weights):
        norm = weights["model.norm.weight"]
        weights["model.norm.weight"] = mx.where(mx.arange(64) == 5, float("-inf"), norm)
        up = weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.1.mlp.up_proj.weight"] = mx.where(up == up[3, 7], float("inf"), up)

    edit_weights(source, change)
    words = r"up_proj\.weight has 1 of 10,240 weights that are NaN .* --allow-nonfinite"
    with pytest.raises(ModelError, match=words):
        convert(source, tmp_path / "out")
    out = convert(source, tmp_path / "out", dtype="float16", allow_nonfinite=True)
    norm = mx.load(str(out / "model.safetensors"))["model.norm.weight"]
    assert norm.dtype == mx.float16
    assert norm[5].item() == float("-inf") and mx.isinf(norm).sum().item() == 1
    model, _ = load(out, use_flash=False)
    up = model.layers[1].mlp.up_proj.weight
    assert up[3, 7].item() == float("inf") and mx.isinf(up).sum().item() == 1


def test_names_and_shapes_are_those_of_mlx_lm(source):
    checkpoint = HFCheckpoint(source)
    model, _ = utils.load_model(source)
    weights = mx.load(str(source / "model.safetensors"))
    assert checkpoint.shapes == {name: w.shape for name, w in weights.items()}
    assert set(checkpoint.dtypes.values()) == {mx.bfloat16}
    taken = checkpoint.take("model.norm.weight")
    assert mx.array_equal(taken, model.model.norm.weight)
    with pytest.raises(KeyError):
        checkpoint.take("model.norm.weight")


def test_fingerprint_knows_config_and_times(source):
    first = HFCheckpoint(source).fingerprint
    assert HFCheckpoint(source).fingerprint == first
    os.utime(source / "model.safetensors", ns=(1, 1))
    second = HFCheckpoint(source).fingerprint
    assert second != first
    edit_config(source, rope_theta=5000.0)
    assert HFCheckpoint(source).fingerprint not in (first, second)


def test_unreadable_file(source, tmp_path, capsys, monkeypatch):
    """As root nothing is forbidden, so what the system would say is put in its mouth."""
    read_text, is_file = json_reader.read_text, Path.is_file

    def refuse(path, *args):
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(json_reader, "read_text", refuse)
        assert "config.json cannot be read: Permission denied" in refused(source, tmp_path, capsys)

    def forbid(self):
        if self.name == "hf":
            raise PermissionError(13, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", forbid)
    assert "Permission denied" in refused(source, tmp_path, capsys)
