"""The report fails whatever is wrong with an export; the interpreter's own operations."""

import shutil
from dataclasses import replace

import mlx.nn as nn
import numpy as np
import pytest
from coremltools.converters.mil.mil.ops.defs.iOS18.compression import (
    constexpr_blockwise_shift_scale,
)
from support.coreml_tools import checkpoint, edited, make, operations, report, settings

from coreml_export import export as export_module
from coreml_export.bundle import manifest, mlpackage, sizes
from coreml_export.bundle.mlpackage import WEIGHTS
from coreml_export.errors import ParityError
from coreml_export.program import layers
from coreml_export.program.coremltools_compat import mb
from coreml_export.quantization import formats
from coreml_export.source import rotary_tables
from coreml_export.verification import gates, kernels
from coreml_export.verification.distances import distance
from coreml_export.verification.paged_host import PagedHost
from mlx_flash.errors import FlashError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("tamper") / "model", layers=3)


@pytest.fixture(scope="module")
def out(model, tmp_path_factory):
    return make(model, tmp_path_factory.mktemp("tamper") / "out")


def test_a_sound_export_passes(model, out):
    assert report(model, out).failed == []


def test_a_dropped_write_to_the_cache_fails(model, out, tmp_path):
    def drop(spec):
        ops = operations(spec, "decode")
        writes = [op for op in ops if op.type == "write_state"]
        before, last = writes[-4], writes[-2]  # keys of the last two layers
        assert last.inputs["input"].arguments[0].name == "keyCache"
        last.inputs["data"].arguments[0].name = before.inputs["data"].arguments[0].name

    assert report(model, edited(out, tmp_path / "bad", drop)).failed


def test_two_kilobytes_of_zeros_fail(model, out, tmp_path):
    shutil.copytree(out, tmp_path / "bad")
    file = tmp_path / "bad/decoder.mlpackage/Data" / WEIGHTS / "weight.bin"
    data = bytearray(file.read_bytes())
    at = len(data) - 10_000  # in the head, which comes last and is larger than that
    data[at : at + 2048] = bytes(2048)
    file.write_bytes(data)
    assert report(model, tmp_path / "bad").failed
    with pytest.raises(FlashError, match="damaged"):
        manifest.verify(tmp_path / "bad", manifest.read(tmp_path / "bad"))


def test_an_input_widened_to_int32_fails(model, out, tmp_path):
    def widen(spec):
        function = spec.mlProgram.functions["decode"]
        mask = next(i for i in function.inputs if i.name == "causalMask")
        mask.type.tensorType.dataType = 23  # INT32
        for described in spec.description.functions:
            for feature in described.input:
                if feature.name == "causalMask":
                    feature.type.multiArrayType.dataType = 131104

    with pytest.raises(ParityError, match="int32"):
        report(model, edited(out, tmp_path / "bad", widen))


def test_two_swapped_layers_fail(model, tmp_path, monkeypatch):
    describe = export_module.describe

    def swapped(source):
        decoder = describe(source)
        a, b, *rest = decoder.layers
        return replace(decoder, layers=[b, a, *rest])

    monkeypatch.setattr(export_module, "describe", swapped)
    assert report(model, make(model, tmp_path / "bad")).failed


def test_a_wrong_rope_base_fails(model, tmp_path, monkeypatch):
    tables = rotary_tables.tables

    def wrong(decoder, context):
        return tables(replace(decoder, rope=nn.RoPE(decoder.rope_dims, base=11000.0)), context)

    monkeypatch.setattr(rotary_tables, "tables", wrong)
    assert report(model, make(model, tmp_path / "bad")).failed


def test_a_norm_that_overflows_fails_and_ours_does_not(tmp_path, monkeypatch):
    import mlx.core as mx

    model = checkpoint(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.embed_tokens.weight"] *= 300.0  # squares above 65504
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    for precision in ("mixed", "fp16"):
        good = make(model, tmp_path / precision, precision=precision)
        assert report(model, good, precision=precision).failed == []

    def naive(self, x, norm):
        x = mb.cast(x=x, dtype="fp16")
        square = mb.reduce_mean(x=mb.mul(x=x, y=x), axes=[-1], keep_dims=True)
        y = mb.mul(x=x, y=mb.rsqrt(x=square, epsilon=np.float16(norm.eps)))
        return mb.mul(x=y, y=self.weights.vector(norm.weight))

    monkeypatch.setattr(layers.Builder, "norm", naive)
    assert report(model, make(model, tmp_path / "bad")).failed


def test_an_export_that_fails_leaves_nothing(model, tmp_path):
    def refuse(*_):
        raise ParityError("no")

    with pytest.raises(ParityError):
        export_module.export(model, tmp_path / "out", settings(context=64), refuse)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_said_to_be_full(model, tmp_path, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(mlpackage.shutil, "disk_usage", lambda path: usage(100, 100, 0))
    monkeypatch.setattr(sizes, "check_disk", lambda *_: None)

    def fails(*_, **__):
        raise RuntimeError("[MIL FileWriter]: Unknown error occurred while writing data")

    monkeypatch.setattr(mlpackage, "to_spec", fails)
    with pytest.raises(FlashError, match="is full"):
        make(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_row_file_is_refused(tmp_path):
    model = checkpoint(tmp_path / "model", "opt")
    out = make(model, tmp_path / "out", profiles=("paged",))
    content = manifest.read(out)
    PagedHost(out, content)
    file = out / "rows.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(FlashError, match="truncated"):
        PagedHost(out, content)
    file.write_bytes(data[:-1] + b"\x55")
    with pytest.raises(FlashError, match="damaged"):
        manifest.verify(out, content)


def test_decompression_agrees_with_coremltools():
    random = np.random.default_rng(0)
    for blocks in (1, 4):
        data = random.integers(-8, 8, (6, 128)).astype(np.int8)
        scale = random.random((6, blocks)).astype(np.float16)
        ours = kernels.shift_scale({"data": data, "scale": scale}).astype(np.float16)
        theirs = constexpr_blockwise_shift_scale.decompress(data, scale, None)
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.008), ("int4", 0.1), ("palette4", 0.13)])
def test_packed_numbers_are_near_what_they_stand_for(scheme, most):
    array = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    packed = formats.pack(array, scheme)
    assert np.sqrt(np.mean((packed.floats() - array) ** 2)) < most
    assert packed.bits / array.size < {"int8": 8.1, "int4": 4.51, "palette4": 4.1}[scheme]


def test_what_lies_outside_a_state_is_an_error():
    with pytest.raises(IndexError):
        kernels.KERNELS["slice_update"](
            {"x": np.zeros((8, 4)), "update": np.ones((2, 4)), "begin": [7, 0], "end": [9, 4]}
        )


def test_ties_of_float16_are_told_from_errors():
    reference = np.array([[20.0, 19.99, 0.0], [20.0, 19.9, 0.0]])
    found = distance(reference[:, [1, 0, 2]], reference)
    assert found.top1 == 0 and found.top1_apart == 0.5 and found.ties == 1
    assert not gates.Gate(kl=1.0, top1=0.4).fails(found)
    assert gates.Gate(kl=1.0, top1=0.6).fails(found)
    assert found.to_json()["ties"] == 1


def test_ties_within_the_measured_rounding():
    """What rounding moves that far is tied; what it does not is an error."""
    reference = np.array([[1.0, 0.99, 0.0], [1.0, 0.9, 0.0]])
    swapped = reference[:, [1, 0, 2]]
    assert distance(swapped, reference).ties == 0
    assert distance(swapped, reference, rounding=0.003).ties == 1
    assert distance(swapped, reference, rounding=0.03).ties == 2
    assert distance(reference, reference, rounding=1.0).ties == 0  # the same is no tie


def test_the_error_of_a_bad_program_is_no_rounding():
    """A program that fails its own gate widens nothing, for itself or for the others."""
    random = np.random.default_rng(0)
    reference = random.standard_normal((64, 300))
    noise = random.standard_normal(reference.shape)
    report = gates.Report("none")
    bad = report.of_program(reference + 0.1 * noise, reference)
    assert report.rounding == 0 and report.export_gate.fails(bad) and bad.top1_apart < 1
    good = report.of_program(reference + 1e-4 * noise, reference)
    assert report.rounding == pytest.approx(1e-4, rel=0.1)
    assert not report.export_gate.fails(good)


@pytest.mark.parametrize("seed", range(2))
def test_two_tokens_as_good_as_each_other(seed, tmp_path):
    """Of a head with rows that differ by less than float16 tells apart, either may be chosen."""
    import mlx.core as mx

    model = checkpoint(tmp_path / "model", seed=seed, tie_word_embeddings=False)
    weights = mx.load(str(model / "model.safetensors"))
    head = weights["lm_head.weight"]
    twins = head[:150] + 1e-5 * mx.random.normal((150, head.shape[1]), key=mx.random.key(seed))
    weights["lm_head.weight"] = mx.concatenate([head[:150], twins])
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    out = make(model, tmp_path / "out")
    found = report(model, out)
    assert found.failed == []
    rows = [apart for _, against, apart, _ in found.rows if against == "MLX float32"]
    assert sum(apart.ties for apart in rows) > 1
    assert all(apart.top1 < apart.top1_apart == 1 for apart in rows)
    assert f"| {rows[0].top1:.2%} | {rows[0].ties} | passed |" in found.markdown()
    assert found.to_json()["rows"][0]["ties"] >= 0
