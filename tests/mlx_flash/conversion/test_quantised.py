"""Quantised weights: mlx-lm's own quantisation says what is right, to the bit where it can.

Where a layer's FFN is one row (no zeros to skip), the model from a directory is what mlx-lm's
``quantize_model`` makes of the checkpoint: the same bytes, the same logits, the same tokens. Where
rows are neurons, down is quantised along d_model, which mlx-lm does not do: there the dense model
from the directory, and a float model of the rows' dequantised values, say what is right.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.convert import mixed_quant_predicate_builder
from support import tiny_mixtures
from support.checkpoints import edit_config, edit_weights
from support.parity import greedy, logits
from support.tiny import config as tiny_config
from support.tiny import make_checkpoint
from support.trained import FIXTURES, RELU, TEXT, TRAINED
from support.trained import greedy as continued
from support.trained import logits as piecewise

from mlx_flash.calibration.calibrate import calibrate
from mlx_flash.conversion.checkpoint import CheckpointFacts, RequestedFormat
from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.model_spec import ModelSpec
from mlx_flash.conversion.row_plan import plan_rows, raw
from mlx_flash.errors import CalibrationError, ModelError, PredictorError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import families
from mlx_flash.models.dtypes import DTYPES
from mlx_flash.models.families import FAMILIES, find, projections, rowwise
from mlx_flash.models.quantized_rows import QuantScheme
from mlx_flash.models.registry import get_classes, make_model
from mlx_flash.runtime.load import load, load_model
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.runtime.pagers.back_end import slow_back_end

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
RELU_LLAMA = {"hidden_act": "relu", "mlp_bias": True}


def quantised_by_mlx_lm(source, bits, group_size, mode="affine", dtype=None, **kwargs):
    """mlx-lm's model of a checkpoint, quantised as its own conversion does it."""
    model, config = utils.load_model(source, get_model_classes=get_classes)
    if dtype:
        model.set_dtype(dtype)
    return utils.quantize_model(model, config, group_size, bits, mode=mode, **kwargs)[0]


def saved_by_mlx_lm(source, path, bits, group_size, mode="affine", **kwargs):
    """The directory that mlx-lm's own conversion leaves."""
    model, config = utils.load_model(source, get_model_classes=get_classes)
    model, config = utils.quantize_model(model, config, group_size, bits, mode=mode, **kwargs)
    utils.save(path, source, model, utils.load_tokenizer(source), config)
    return path


def rows_in(directory, layer):
    """Part -> bytes of the rows of a layer [rows, nbytes], out of the row file."""
    extent = directory.rows.layers[layer]
    data = np.fromfile(directory.rows.path, np.uint8, extent.nbytes, offset=extent.offset)
    data = data.reshape(extent.rows, extent.layout.stride)
    return {p.name: data[:, p.offset : p.offset + p.nbytes] for p in extent.layout.parts}


def assert_rows_are_the_tensors(directory, weights, paths):
    """Each layer is one row: the tensors of its FFN, byte for byte."""
    assert directory.unit == "layer"
    for layer, path in enumerate(paths):
        parts = rows_in(directory, layer)
        assert any(name.endswith("scales") for name in parts)
        for name, found in parts.items():
            expected = raw(weights[f"{path}.{name}"]).reshape(-1).view(np.uint8)
            assert np.array_equal(found.reshape(-1), expected), f"{path}.{name}"


# A layer a row


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """dtype -> a checkpoint of a llama whose sizes are whole groups of 128."""
    path = tmp_path_factory.mktemp("wide")
    return {
        dtype: make_checkpoint(path / dtype, "llama", dtype, layers=2, **WIDE)
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_same_as_mlx_lm(wide, tmp_path, bits, group_size):
    source = wide["float32" if bits % 2 else "bfloat16"]
    asked = {"quantize": True, "q_bits": bits, "q_group_size": group_size}
    directory = ModelDirectory(convert(source, tmp_path / "out", **asked))
    assert directory.unit == "layer"
    reference = quantised_by_mlx_lm(source, bits, group_size)
    expected, tokens = logits(reference), greedy(reference, 4)
    for share in (0.0, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert len(model.flash.plan.streamed) == round((1 - share) * 2)
        assert mx.array_equal(logits(model), expected), f"logits at share {share}"
        assert greedy(model, 4) == tokens
        model.flash.close()
    assert mx.array_equal(logits(load_model(directory, PagingOptions(use_flash=False))), expected)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [
        (4, 64, "bfloat16"),
        (8, 32, "float32"),
        pytest.param(4, 64, "float32", marks=pytest.mark.whole),
        pytest.param(8, 32, "bfloat16", marks=pytest.mark.whole),
    ],
)
def test_128_tokens(wide, tmp_path, bits, group_size, dtype):
    asked = {"quantize": True, "q_bits": bits, "q_group_size": group_size}
    directory = ModelDirectory(convert(wide[dtype], tmp_path / "out", **asked))
    tokens = greedy(quantised_by_mlx_lm(wide[dtype], bits, group_size))
    assert len(tokens) == 128
    for share in (0.0, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert greedy(model) == tokens, f"tokens at share {share}"
        model.flash.close()


@pytest.mark.parametrize("cast", ["float32", "bfloat16"])
def test_cast_before_quantising(wide, tmp_path, cast):
    """--dtype with -q: floats are cast first, as in mlx-lm's conversion."""
    (source,) = (path for dtype, path in wide.items() if dtype != cast)
    directory = ModelDirectory(convert(source, tmp_path / "out", quantize=True, dtype=cast))
    reference = quantised_by_mlx_lm(source, 4, 64, dtype=getattr(mx, cast))
    assert mx.array_equal(
        logits(load_model(directory, PagingOptions(kept_share=0.0))), logits(reference)
    )


@pytest.mark.parametrize(("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32)])
def test_modes(wide, tmp_path, mode, bits, group_size):
    """QuantizedRows floats: scales of one byte, no biases."""
    directory = ModelDirectory(
        convert(wide["bfloat16"], tmp_path / "out", quantize=True, q_mode=mode)
    )
    assert directory.config["quantization"]["mode"] == mode
    names = [part.name for part in directory.rows.layout.parts]
    assert "gate_proj.scales" in names
    assert "gate_proj.biases" not in names
    reference = quantised_by_mlx_lm(wide["bfloat16"], bits, group_size, mode)
    for share in (0.0, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert mx.array_equal(logits(model), logits(reference))
        assert greedy(model, 32) == greedy(reference, 32)
        model.flash.close()


def test_recipe(tmp_path):
    """More bits for some layers: rows of different layouts in one file."""
    source = make_checkpoint(tmp_path / "hf", "llama", "float32", layers=8, **WIDE)
    out = convert(source, tmp_path / "out", quantize=True, quant_predicate="mixed_4_6")
    directory = ModelDirectory(out)
    assert len(directory.rows.layouts) == 2
    saved = saved_by_mlx_lm(
        source, tmp_path / "saved", 4, 64, quant_predicate=recipe_of(source, "mixed_4_6")
    )
    reference, _ = utils.load_model(saved)
    for share in (0.0, 0.25, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert mx.array_equal(logits(model), logits(reference)), f"logits at share {share}"
        assert greedy(model, 32) == greedy(reference, 32)
        model.flash.close()
    again = ModelDirectory(convert(saved, tmp_path / "again"))
    assert again.rows.fingerprint == directory.rows.fingerprint, "the same rows either way"


def recipe_of(source, recipe):
    return mixed_quant_predicate_builder(recipe, utils.load_model(source)[0], 64)


@pytest.mark.parametrize("family", ["phi3", "glm4", "starcoder2", "gpt2", "phi"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_and_ungated(tmp_path, family, dtype):
    """Gate and up in one matrix; FFNs without a gate, whose biases stay resident."""
    source = make_checkpoint(tmp_path / "hf", family, dtype, layers=2)
    directory = ModelDirectory(convert(source, tmp_path / "out", quantize=True, q_group_size=32))
    assert directory.unit == "layer"
    reference = quantised_by_mlx_lm(source, 4, 32)
    assert_rows_are_the_tensors(
        directory,
        dict(tree_flatten(reference.parameters())),
        [path for path, _ in found_ffns(reference, directory)],
    )
    resident = mx.load(str(directory.path / "model.safetensors"))
    biased = {n for n, _ in tree_flatten(reference.parameters()) if n.endswith(".bias")}
    assert biased == {name for name in resident if name.endswith(".bias")}
    for share in (0.0, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert mx.array_equal(logits(model), logits(reference)), f"logits at share {share}"
        assert greedy(model, 24) == greedy(reference, 24)
        model.flash.close()


def found_ffns(model, directory):
    return families.modules(model, directory.ffn)


def is_rowwise(family):
    return rowwise(find(tiny_config(family)))


REFUSED = {"afm7": "unexpected keyword argument 'mode'", "granite": "group size 64"}


@pytest.mark.parametrize("family", REFUSED)
def test_what_mlx_lm_cannot_quantise(tmp_path, family):
    """Modules without the mode, and a predicate of the family's own that does not fit its sizes."""
    source = make_checkpoint(tmp_path / "hf", family)
    with pytest.raises((TypeError, ValueError), match=REFUSED[family]):
        quantised_by_mlx_lm(source, 4, 32)
    message = refused(source, tmp_path, quantize=True, q_group_size=32)
    assert f"{source}: mlx-lm cannot quantise this {family} model to 4 bits" in message
    assert REFUSED[family] in message


def quantised_families():
    """Those whose rows are whole layers; make test has every third."""
    for n, family in enumerate(sorted(FAMILIES)):
        if not is_rowwise(family) and family not in REFUSED:
            yield pytest.param(family, marks=[pytest.mark.whole] if n % 3 else [])


@pytest.mark.parametrize("family", quantised_families())
def test_every_family_without_zeros(tmp_path, family):
    source = make_checkpoint(tmp_path / "hf", family, "float32")
    directory = ModelDirectory(convert(source, tmp_path / "out", quantize=True, q_group_size=32))
    assert directory.unit == "layer"
    expected = logits(quantised_by_mlx_lm(source, 4, 32))
    for share in (0.0, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert mx.array_equal(logits(model), expected), f"logits at share {share}"
        model.flash.close()


def test_ffn_that_is_quantised_in_part(tmp_path):
    """64 does not divide d_ffn 160: mlx-lm leaves down as it is, and so do the rows."""
    source = make_checkpoint(tmp_path / "hf", "llama", "bfloat16")
    directory = ModelDirectory(convert(source, tmp_path / "out", quantize=True))
    kinds = {part.name: part.dtype for part in directory.rows.layout.parts}
    assert (kinds["gate_proj.weight"], kinds["down_proj.weight"]) == ("U32", "BF16")
    reference = quantised_by_mlx_lm(source, 4, 64)
    for share in (0.0, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert mx.array_equal(logits(model), logits(reference))
        model.flash.close()


# Quantised already


@pytest.mark.parametrize(
    ("bits", "group_size", "mode"),
    [(2, 128, "affine"), (3, 64, "affine"), (4, 32, "affine"), (8, 64, "affine"), (4, 32, "mxfp4")],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_are_kept_as_they_are(
    wide,
    tmp_path,
    bits,
    group_size,
    mode,
    dtype,
):
    source = saved_by_mlx_lm(wide[dtype], tmp_path / "saved", bits, group_size, mode)
    directory = ModelDirectory(convert(source, tmp_path / "out"))
    weights = mx.load(str(source / "model.safetensors"))
    paths = [f"model.layers.{i}.mlp" for i in range(2)]
    assert_rows_are_the_tensors(directory, weights, paths)
    resident = mx.load(str(directory.path / "model.safetensors"))
    for name, tensor in resident.items():
        assert np.array_equal(raw(tensor), raw(weights[name])), name
    assert set(weights) - set(resident) == {
        f"{path}.{part.name}" for path in paths for part in directory.rows.layout.parts
    }
    dense, _ = utils.load_model(source)
    for share in (0.0, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert mx.array_equal(logits(model), logits(dense))
        model.flash.close()


@pytest.mark.parametrize("family", ["llama", "opt", "nemotron"])
def test_quantised_relu_checkpoints_are_read_whole(tmp_path, family):
    """Their down is quantised across neurons: no neuron can be read alone."""
    source = make_checkpoint(tmp_path / "hf", family, "float32", **RELU[family])
    saved = saved_by_mlx_lm(source, tmp_path / "saved", 4, 32)
    directory = ModelDirectory(convert(saved, tmp_path / "out"))
    assert directory.unit == "layer"
    expected = logits(utils.load_model(saved, get_model_classes=get_classes)[0])
    assert mx.array_equal(logits(load_model(directory, PagingOptions(kept_share=0.0))), expected)
    with pytest.raises(PredictorError, match="groups that span many neurons"):
        load_model(directory, PagingOptions(predictor="gate"))


@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_dequantize(tmp_path, family):
    """Floats of a quantised checkpoint, as mlx-lm dequantises them; neurons are rows again."""
    if family == "mixtral":
        source = tiny_mixtures.make_mixture(tmp_path / "hf", family, num_hidden_layers=2)
    else:
        source = make_checkpoint(tmp_path / "hf", family, "float32", layers=2)
    saved = saved_by_mlx_lm(source, tmp_path / "saved", 4, 32)
    directory = ModelDirectory(convert(saved, tmp_path / "out", dequantize=True))
    assert directory.unit == ("expert" if family == "mixtral" else "neuron")
    assert "quantization" not in directory.config
    assert "quantization_config" not in directory.config
    reference = utils.dequantize_model(utils.load_model(saved, get_model_classes=get_classes)[0])
    found = dict(tree_flatten(load_model(directory, PagingOptions(use_flash=False)).parameters()))
    expected = dict(tree_flatten(reference.parameters()))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert mx.array_equal(found[name], weight), name


# Neurons with scales of their own


def floats_of(directory):
    """A float32 model with plain linear layers, of the numbers that a directory's files stand for.

    What is packed is unpacked here, from the files alone.
    """
    config = {k: v for k, v in directory.config.items() if k not in ("flash", "quantization")}
    model, scheme = make_model(config), directory.scheme
    kwargs = scheme.kwargs()

    def unpacked(tensors, name, scale):
        if f"{scale}scales" not in tensors:
            return tensors[name].astype(mx.float32)
        scales = [tensors[f"{scale}{suffix}"] for suffix in scheme.suffixes]
        return mx.dequantize(tensors[name], *scales, **kwargs).astype(mx.float32)

    resident = {}
    for shard in directory.shards:
        resident |= mx.load(str(shard))
    weights = {
        name: unpacked(resident, name, name.removesuffix("weight"))
        for name in resident
        if not name.endswith((".scales", ".biases"))
    }
    for layer, (path, _) in enumerate(found_ffns(model, directory)):
        parts = rows_in(directory, layer)
        kinds = {p.name: DTYPES[p.dtype] for p in directory.rows.layers[layer].layout.parts}
        arrays = {name: mx.array(data.copy()).view(kinds[name]) for name, data in parts.items()}
        for part, name in projections(directory.ffn).items():
            values = unpacked(arrays, part, f"{part}.")
            weights[f"{path}.{name}.weight"] = values.T if part == "down" else values
    model.load_weights(list(weights.items()))
    return model


def relative(found, expected):
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(found - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("family", RELU)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32)])
def test_every_relu_family(tmp_path, family, bits, group_size):
    """Dense, streamed, kept and predicted, of the same directory; and floats of its numbers."""
    source = make_checkpoint(tmp_path / "hf", family, "float32", **RELU[family])
    asked = {"quantize": True, "q_bits": bits, "q_group_size": group_size}
    directory = ModelDirectory(convert(source, tmp_path / "out", **asked))
    assert directory.unit == "neuron"
    assert directory.scheme == QuantScheme(bits, group_size)
    names = [part.name for part in directory.rows.layout.parts]
    assert [n for n in names if "." not in n] == list(directory.ffn.parts)
    assert {f"{n}.{s}" for n in directory.ffn.parts for s in ("scales", "biases")} < set(names)
    dense = load_model(directory, PagingOptions(use_flash=False))
    tokens = np.random.default_rng(0).integers(3, 300, 90).tolist()
    sizes = (70, *[1] * 20)
    expected = piecewise(dense, tokens, *sizes)
    assert relative(piecewise(floats_of(directory), tokens, *sizes), expected) < 1e-3
    for share in (0.0, 0.5, 1.0):
        model = load_model(directory, PagingOptions(kept_share=share))
        assert relative(piecewise(model, tokens, *sizes), expected) < 1e-5, f"kept {share}"
        model.flash.close()
    for share in (0.1, 0.8):
        model = load_model(directory, PagingOptions(cache_share=share))
        assert model.flash.selection.exact
        assert relative(piecewise(model, tokens, *sizes), expected) < 1e-4, f"slots {share}"
        model.flash.close()


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("affine", "bfloat16"),
        pytest.param("affine", "float32", marks=pytest.mark.whole),
        pytest.param("mxfp4", "float32", marks=pytest.mark.whole),
    ],
)
@pytest.mark.parametrize("name", TRAINED)
def test_trained(tmp_path, name, dtype, mode):
    """128 of 128 tokens with room for 15 % of the rows.

    MLX's CPU kernel for packed rows adds up in the type of its input: in bfloat16 every addition
    rounds, though adding a row that does not fire rounds nothing. So token by token, and where rows
    are streamed or kept, logits in bfloat16 are the dense ones to the bit. A prompt that wants most
    rows is summed piece by piece in float32: its logits are about as far from those of the numbers
    in float32 as the dense model's.
    """
    out = convert(FIXTURES / name, tmp_path / "out", quantize=True, q_mode=mode, dtype=dtype)
    directory = ModelDirectory(out)
    assert directory.unit == "neuron"
    dense, tokenizer = load(out, use_flash=False)
    text = tokenizer.encode(TEXT)
    prompt = text if dtype == "float32" else text[:1]
    expected = continued(dense, prompt)
    assert len(expected) == 128
    model = load_model(directory, PagingOptions(cache_share=0.15))
    assert model.flash.selection.kind == ("up" if name.startswith("opt") else "gate")
    assert continued(model, prompt) == expected
    stats = model.flash.stats()
    assert stats.hits > 0
    assert stats.misses > 0
    assert stats.predicted / stats.layer_calls < 0.25 * directory.rows.layers[0].rows
    tokens, steps = text + expected[:12], [len(text), *[1] * 12]
    floats = floats_of(directory)
    for sizes in (steps, [1] * len(tokens)):
        right, true = piecewise(dense, tokens, *sizes), piecewise(floats, tokens, *sizes)
        found = piecewise(model, tokens, *sizes)
        if dtype == "float32":
            assert relative(found, right) < 1e-3
            assert relative(found, true) < 1e-3
        elif sizes is steps:
            assert relative(found, true) < 1.5 * relative(right, true) < 0.1
        else:
            assert mx.array_equal(found, right)
        for share in (0.0, 0.5, 1.0):
            kept = load_model(directory, PagingOptions(kept_share=share))
            found = piecewise(kept, tokens, *sizes)
            assert mx.array_equal(found, right), f"logits with {share} of the layers kept"
            kept.flash.close()
    model.flash.close()


def test_neurons_are_quantised_as_mlx_does(tmp_path):
    """Gate and up as mlx-lm quantises them, down's columns as MLX does; independent of blocks."""
    source = make_checkpoint(tmp_path / "hf", "llama", "bfloat16", layers=2, **RELU_LLAMA)
    weights = mx.load(str(source / "model.safetensors"))
    out = convert(source, tmp_path / "out", quantize=True, q_group_size=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_flash.conversion.row_plan.BLOCK_BYTES", 1 << 12)
        blocks = convert(source, tmp_path / "blocks", quantize=True, q_group_size=32)
    directory = ModelDirectory(out)
    assert directory.rows.fingerprint == ModelDirectory(blocks).rows.fingerprint
    for layer in range(2):
        parts = rows_in(directory, layer)
        for part in ("gate", "up", "down"):
            weight = weights[f"model.layers.{layer}.mlp.{part}_proj.weight"]
            found = mx.quantize(weight.T if part == "down" else weight, 32, 4)
            for name, array in zip((part, f"{part}.scales", f"{part}.biases"), found, strict=True):
                expected = np.ascontiguousarray(raw(array)).view(np.uint8)
                assert np.array_equal(parts[name], expected), name


# Bytes


@dataclass
class Shapes:
    """As much of a checkpoint as a plan needs."""

    config: dict
    shapes: dict
    dtypes: dict
    facts: CheckpointFacts = field(default_factory=CheckpointFacts)

    @property
    def spec(self):
        return ModelSpec.of(self.config, Path("config"))


def packed_shapes(shapes, scheme, dtype):
    """Names of packed tensors with their shapes and types, from those of float ones."""
    found, kinds = {}, {}
    for name, shape in shapes.items():
        found[name], kinds[name] = (*shape[:-1], scheme.words(shape[-1])), mx.uint32
        for suffix in scheme.suffixes:
            other = name.removesuffix("weight") + suffix
            found[other] = (*shape[:-1], shape[-1] // scheme.group_size)
            kinds[other] = dtype
    return found, kinds


def test_bytes_of_neurons():
    """A neuron of 4 bits, d_model 2048: at most 15 % above 4.5 bits a weight."""
    config = tiny_config("llama", 1, hidden_size=2048, intermediate_size=8, hidden_act="relu")
    scheme, path = QuantScheme(4, 64), "model.layers.0.mlp"
    gates = {f"{path}.{name}_proj.weight": (8, 2048) for name in ("gate", "up")}
    shapes, kinds = packed_shapes(gates, scheme, mx.bfloat16)
    shapes[f"{path}.down_proj.weight"], kinds[f"{path}.down_proj.weight"] = (2048, 8), mx.bfloat16
    plan = plan_rows(Shapes(config, shapes, kinds, CheckpointFacts(row_scheme=scheme)))
    assert plan.unit == "neuron"
    ideal = 3 * 2048 * 4.5 / 8
    assert plan.layouts[0].ideal_bytes == ideal
    assert plan.layouts[0].stride <= 1.15 * ideal


@pytest.mark.parametrize(("d_model", "d_expert"), [(2048, 768), (2048, 1024), (4096, 1536)])
def test_bytes_of_experts(d_model, d_expert):
    """An expert of 4 bits: at most 2 % above 4.5 bits a weight."""
    config = tiny_mixtures.config(
        "qwen3_moe",
        hidden_size=d_model,
        moe_intermediate_size=d_expert,
        num_hidden_layers=1,
        mlp_only_layers=[],
    )
    scheme, path = QuantScheme(4, 64), "model.layers.0.mlp.switch_mlp"
    count = tiny_mixtures.EXPERTS
    floats = {f"{path}.{n}_proj.weight": (count, d_expert, d_model) for n in ("gate", "up")}
    floats[f"{path}.down_proj.weight"] = (count, d_model, d_expert)
    shapes, kinds = packed_shapes(floats, scheme, mx.bfloat16)
    plan = plan_rows(Shapes(config, shapes, kinds))
    assert plan.unit == "expert"
    ideal = 3 * d_model * d_expert * 4.5 / 8
    assert plan.layouts[0].ideal_bytes == ideal
    assert plan.layouts[0].stride <= 1.02 * ideal
    assert plan.layouts[0].scatters


# What is refused


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "hf", "llama", "bfloat16", layers=2)


@pytest.fixture
def saved(source, tmp_path):
    """The same in 4 bits, groups of 32."""
    return saved_by_mlx_lm(source, tmp_path / "saved", 4, 32)


def refused(source, tmp_path, **options):
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "made" / "out", **options)
    assert not (tmp_path / "made").exists()
    return str(caught.value)


def quantization_of(path):
    return json.loads((path / "config.json").read_text())["quantization"]


def set_quantization(path, quantization):
    edit_config(path, quantization=quantization, quantization_config=quantization)


@pytest.mark.parametrize(
    ("default", "said"),
    [
        ({"bits": 8, "group_size": 32}, "8 bits in groups of 32"),
        ({"bits": 4, "group_size": 64}, "4 bits in groups of 64"),
    ],
)
def test_default_that_contradicts_the_tensors(saved, tmp_path, default, said):
    set_quantization(saved, default | {"mode": "affine"})
    message = refused(saved, tmp_path)
    assert f"{saved}: the quantisation in config.json contradicts the tensors" in message
    assert f"config.json says {said} (affine), but no tensor is packed that way" in message


def test_override_that_contradicts_the_tensor(saved, tmp_path):
    path = "model.layers.1.mlp.down_proj"
    set_quantization(saved, quantization_of(saved) | {path: {"bits": 8, "group_size": 32}})
    message = refused(saved, tmp_path)
    assert f"{path}: 8 bits in groups of 32 (affine) in config.json" in message
    assert "4 bits in groups of 32 (affine) in the tensors" in message


def test_override_of_a_tensor_that_is_not_quantised(saved, tmp_path):
    """Quantised by its own entry, but a float tensor in the file."""
    path = "model.layers.1.mlp.down_proj"
    floats = mx.load(str(tmp_path / "hf" / "model.safetensors"))

    def change(weights):
        weights[f"{path}.weight"] = floats[f"{path}.weight"]
        del weights[f"{path}.scales"], weights[f"{path}.biases"]

    edit_weights(saved, change)
    set_quantization(saved, quantization_of(saved) | {path: {"bits": 4, "group_size": 32}})
    assert f"{path}: quantised in config.json, the tensor is not" in refused(saved, tmp_path)


def test_float_tensors_under_a_quantised_config(source, tmp_path):
    set_quantization(source, {"bits": 4, "group_size": 32})
    message = refused(source, tmp_path)
    assert "4 bits in groups of 32 (affine), but no tensor is quantised" in message


def test_packed_tensors_under_a_float_config(saved, tmp_path):
    edit_config(saved, quantization=..., quantization_config=...)
    message = refused(saved, tmp_path)
    assert str(saved) in message
    assert (
        "16 tensors are quantised (lm_head.scales and so on), but the config.json says" in message
    )


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 4},
        {"group_size": 32},
        {"bits": "4", "group_size": 32},
        {"bits": 4, "group_size": None},
        {"bits": 4.5, "group_size": 32},
        {"bits": 7, "group_size": 32},
        {"bits": 4, "group_size": 48},
        {"bits": 4, "group_size": 0},
        {"bits": 4, "group_size": 32, "mode": "int4"},
        {"bits": 4, "group_size": 32, "mode": ["affine"]},
        [4, 32],
        "4bit",
    ],
    ids=str,
)
def test_quantisation_that_makes_no_sense(saved, tmp_path, quantization):
    set_quantization(saved, quantization)
    assert str(saved) in refused(saved, tmp_path)


@pytest.mark.parametrize("value", [{"bits": 4}, {"bits": 7, "group_size": 32}, {"mode": "affine"}])
def test_override_that_makes_no_sense(saved, tmp_path, value):
    path = "model.layers.1.mlp.down_proj"
    set_quantization(saved, quantization_of(saved) | {path: value})
    assert str(saved) in refused(saved, tmp_path)


@pytest.mark.parametrize("bits", [7, 9, 16, 0, -4])
def test_bits_that_mlx_cannot_do(source, tmp_path, bits):
    assert f"{bits} bits" in refused(source, tmp_path, quantize=True, q_bits=bits)


@pytest.mark.parametrize("group_size", [1, 8, 48, 256, 0, -32])
def test_groups_that_mlx_cannot_do(source, tmp_path, group_size):
    assert f"groups of {group_size}" in refused(
        source, tmp_path, quantize=True, q_group_size=group_size
    )


def test_modes_that_mlx_cannot_do(source, tmp_path):
    message = refused(source, tmp_path, quantize=True, q_mode="int4")
    assert "'int4'; expected one of affine, mxfp4, mxfp8" in message
    message = refused(source, tmp_path, quantize=True, q_mode="mxfp4", q_group_size=64)
    assert "groups of 64 (mxfp4)" in message


@pytest.mark.parametrize("what", [{"q_bits": 4}, {"q_group_size": 32}, {"q_mode": "mxfp4"}])
def test_how_without_whether(source, tmp_path, what):
    assert "ask for that, too (-q)" in refused(source, tmp_path, **what)


@pytest.mark.parametrize("family", ["llama", "opt", "nemotron"])
def test_group_that_does_not_divide_d_model(tmp_path, family):
    """Neurons have scales along d_model, here 64 numbers, which 128 does not divide."""
    source = make_checkpoint(tmp_path / "hf", family, layers=2, **RELU[family])
    message = refused(source, tmp_path, quantize=True, q_group_size=128)
    assert f"{source}: rows of 64 numbers cannot be quantised in groups of 128" in message
    assert "choose a --q-group-size that divides 64, or leave -q out" in message


def test_nothing_that_could_be_quantised(source, tmp_path):
    """Every matrix has 64 or 160 inputs, none of which are whole groups of 128."""
    message = refused(source, tmp_path, quantize=True, q_group_size=128)
    assert f"{source}: nothing can be quantised to 4 bits in groups of 128 (affine)" in message
    assert "choose a smaller --q-group-size, or leave -q out" in message


def test_quantising_what_is_quantised(saved, tmp_path):
    message = refused(saved, tmp_path, quantize=True)
    assert f"{saved}: quantised already (4 bits in groups of 32 (affine)); leave -q out" in message


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "compressed-tensors", 7])
@pytest.mark.parametrize("nested", [False, True])
def test_formats_of_others(source, tmp_path, method, nested):
    found = {"quantization_config": {"quant_method": method, "bits": 4}}
    edit_config(source, **({"text_config": found} if nested else found))
    message = refused(source, tmp_path)
    assert f"{source}: quantised by {method!r} (quantization_config in config.json)" in message
    assert "expected mlx-lm's own quantisation" in message
    assert "the float checkpoint" in message


def test_recipes_that_do_not_fit(source, tmp_path):
    message = refused(source, tmp_path, quantize=True, quant_predicate="mixed_9_9")
    assert "recipe 'mixed_9_9'; expected one of mixed_2_6" in message
    assert "ask for that, too (-q)" in refused(source, tmp_path, quant_predicate="mixed_4_6")
    relu = make_checkpoint(tmp_path / "relu", "llama", layers=2, hidden_act="relu")
    message = refused(relu, tmp_path, quantize=True, quant_predicate="mixed_4_6")
    assert "rows all have the same number of bits" in message


def test_quantise_or_dequantise(source, tmp_path):
    assert "not both" in refused(source, tmp_path, quantize=True, dequantize=True)
    with pytest.raises(ModelError, match="'int8' is not one of"):
        RequestedFormat("int8")


@pytest.mark.parametrize("predictor", ["gate", "up", "low-rank", "threshold"])
def test_predictors_are_for_neurons(source, tmp_path, predictor):
    out = convert(source, tmp_path / "out", quantize=True, q_group_size=32)
    with pytest.raises(PredictorError, match="quantised in groups that span many neurons"):
        load(out, predictor=predictor)
    with pytest.raises(CalibrationError, match="quantised FFNs are read whole"):
        calibrate(out)
    assert greedy(load(out, predictor="none")[0], 2)


def test_directories_say_how_they_are_packed(source, tmp_path):
    """config.json has mlx-lm's entry, so mlx-lm makes the modules; neurons have one of their own"""
    flash = json.loads(
        (
            convert(source, tmp_path / "a", quantize=True, q_group_size=32) / "config.json"
        ).read_text()
    )
    assert (flash["quantization"]["bits"], flash["quantization"]["group_size"]) == (4, 32)
    assert flash["flash"]["quantization"] is None
    relu = make_checkpoint(tmp_path / "relu", "llama", layers=2, hidden_act="relu")
    flash = json.loads(
        (convert(relu, tmp_path / "b", quantize=True, q_group_size=32) / "config.json").read_text()
    )
    assert flash["flash"]["quantization"] == {"bits": 4, "group_size": 32, "mode": "affine"}
    assert Path(flash["flash"]["row_file"]).suffix == ".safetensors"


def test_streamed_layers_take_two_buffers(tmp_path):
    """Of layers that are not kept no more is in memory than what streams them."""
    source = make_checkpoint(
        tmp_path / "hf", "llama", "float32", layers=12, hidden_size=256, intermediate_size=4096
    )
    directory = ModelDirectory(convert(source, tmp_path / "out", quantize=True, q_bits=8))
    one = directory.rows.layer_bytes(0)
    assert one > 3_000_000
    before = mx.get_active_memory()
    model = load_model(directory, PagingOptions(kept_share=0.0))
    for _ in range(3):
        mx.eval(model(mx.array([[5]])))
        resident = sum(file.stat().st_size for file in directory.shards)
        assert mx.get_active_memory() - before < resident + 3 * one
    model.flash.close()


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_dequantize_every_kind_of_module(tmp_path, family):
    """Floats of every quantised matrix, those of MLA's own kind included."""
    source = tiny_mixtures.make_mixture(tmp_path / "hf", family, "float32")
    packed = tiny_mixtures.quantised(source, tmp_path / "packed", 4, 32)
    out = convert(packed, tmp_path / "out", dequantize=True)
    config = json.loads((out / "config.json").read_text())
    assert "quantization" not in config
    dense = utils.load_model(packed)[0]
    model = load(out, cache_share=0.5)[0]
    assert relative(logits(model), logits(dense)) < 1e-4
    model.flash.close()


@pytest.mark.parametrize(("dtype", "slow"), [("float32", False), ("bfloat16", True)])
def test_a_slow_back_end_is_told(tmp_path, dtype, slow):
    """Quantised products take MLX's CPU back end long in half precision; floats do not."""
    source = make_checkpoint(tmp_path / "hf", "llama", dtype)
    packed = ModelDirectory(convert(source, tmp_path / "packed", quantize=True))
    assert ("--dtype float32" in slow_back_end(packed)) == slow
    assert slow_back_end(ModelDirectory(convert(source, tmp_path / "floats"))) == ""
