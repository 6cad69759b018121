"""Exports of every architecture, held against MLX; what an export holds; what is refused."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from support import tiny
from support.coreml_tools import (
    CONTEXT,
    FIXTURES,
    checkpoint,
    make,
    measured,
    operations,
    report,
    settings,
)

from coreml_export import cli
from coreml_export.bundle import manifest, sizes
from coreml_export.export import export
from coreml_export.quantization import calibrate as calibrate_module
from coreml_export.source import rotary_tables, tokenizer
from coreml_export.source.families import describe
from coreml_export.source.weights_source import Source
from coreml_export.verification.interpreter import Package
from coreml_export.verification.verify import dense_runner, logits
from mlx_flash.errors import FlashError, ReadError

QUICK = 96  # tokens of context: measured on 64, without a greedy continuation
FALCON_RW = {"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
MODELS = {
    "llama tied": ("llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    "llama old pairs, linear": (
        "llama",
        {"rope_traditional": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "sparsellama": ("sparsellama", {}),
    "bamboo": ("bamboo", {"sliding_window": None}),
    "opt": ("opt", {}),
    "opt narrow, norms last": ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "falcon groups": ("falcon", {}),
    "falcon one key": ("falcon", {"new_decoder_architecture": False}),
    "falcon alibi": ("falcon", FALCON_RW | {"alibi": True, "bias": True}),
    "persimmon yarn": ("persimmon", {"rope_scaling": YARN}),
    "phi": ("phi", {}),
    "phi relu": ("phi", {"hidden_act": "relu"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_what_mlx_computes(name, tmp_path):
    model_type, other = MODELS[name]
    model = checkpoint(tmp_path / "model", model_type, **other)
    make(model, tmp_path / "out")
    runner = dense_runner(tmp_path / "out", manifest.read(tmp_path / "out"))
    tokens = tokenizer.sample(model, 80)
    expected = logits(Source(model).reference(), tokens)
    found = runner.prompt(tokens)  # 64 by prefill, 16 by decode
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 0.005 * scale
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.95


def test_a_window_is_refused_beyond_it(tmp_path):
    model = checkpoint(tmp_path / "model", "bamboo", sliding_window=64)
    with pytest.raises(FlashError, match="64 only"):
        make(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "settings", "limit"),
    [
        ("mistral", {"sliding_window": 96}, 96),
        ("qwen2", {"sliding_window": 80, "use_sliding_window": True, "max_window_layers": 0}, 80),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 512),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 72,
                    "short_factor": [1.0] * 8,
                    "long_factor": [2.0] * 8,
                }
            },
            72,
        ),
    ],
)
def test_contexts_end_where_a_window_or_other_positions_begin(tmp_path, family, settings, limit):
    model = tiny.make_checkpoint(tmp_path / "model", family, **settings)
    assert describe(Source(model)).limit == limit


def test_rope_tables_are_those_of_mlx(tmp_path):
    decoder = describe(Source(checkpoint(tmp_path / "model", "persimmon")))
    cos, sin = rotary_tables.tables(decoder, 64)
    x = mx.random.normal((1, 1, 64, 16), key=mx.random.key(0))
    expected = np.array(decoder.rope(x, offset=0))[0, 0]
    first, second = np.array(x)[0, 0, :, :4], np.array(x)[0, 0, :, 4:8]
    np.testing.assert_allclose(expected[:, :4], first * cos - second * sin, atol=1e-5)
    np.testing.assert_allclose(expected[:, 4:8], first * sin + second * cos, atol=1e-5)


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    monkeypatch.setattr(calibrate_module, "TEXTS", 4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A verified export of the trained ReLU llama, both profiles, few cached rows."""
    from coreml_export.verification.verify import verify

    out = tmp_path_factory.mktemp("llama") / "out"
    chosen = settings(profiles=("dense", "paged"), cache_rows=192)
    return export(FIXTURES / "llama-relu-austen", out, chosen, verify)


def test_a_trained_llama_passes_all_gates_dense_and_paged(llama):
    found = json.loads((llama / "parity.json").read_text())
    assert found["passed"]
    by_name = {(row["function"], row["against"]): row for row in found["rows"]}
    assert by_name["decode", "MLX float32, stored weights"]["psnr"] > 65
    for mode in ("rows", "cache"):
        assert by_name[f"paged ({mode})", "dense package"]["top1"] == 1
    evicted = found["facts"]["paged (cache)"].split(", ")[-1]
    assert int(evicted.split()[0]) > 100


def test_an_export_holds_what_the_manifest_says(llama):
    content = manifest.read(llama)
    manifest.verify(llama, content)
    names = {file.relative_to(llama).as_posix() for file in llama.rglob("*") if file.is_file()}
    assert set(content["files"]) == names - set(manifest.UNHASHED)
    assert {"tokenizer/tokenizer.json", "embedding.bin", "rows.safetensors", "golden.npz"} <= names
    functions = content["dense"]["packages"]["decoder"]["functions"]
    assert set(functions) == {"decode", "prefill"}
    for name, length in (("decode", 1), ("prefill", 64)):
        entry = functions[name]
        assert entry["inputs"] == {
            "inputIds": {"dtype": "int32", "shape": [1, length]},
            "position": {"dtype": "int32", "shape": [1]},
            "causalMask": {"dtype": "float16", "shape": [1, 1, length, CONTEXT]},
        }
        assert entry["outputs"]["logits"] == {"dtype": "float32", "shape": [1, length, 1024]}
        assert set(entry["states"]) == {"keyCache", "valueCache"}
        for state in entry["states"].values():
            assert state["dtype"] == "float16"
            assert all(n % 32 == 0 for n in state["shape"])
    for i in range(4):
        assert content["paged"]["rows"]["offsets"][i] % 512 == 0
    assert content["eos"] == [2]


def test_the_second_function_shares_the_weights(llama):
    content = manifest.read(llama)
    file = llama / "decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    parameters = content["architecture"]["parameters"]
    assert file.stat().st_size < 1.03 * 2 * parameters


def test_the_rows_that_are_given_are_float16(llama):
    entry = manifest.functions(llama / "paged.mlpackage")["ffn_rows_64"]
    assert entry["inputs"]["rows"]["dtype"] == "float16"
    mask = manifest.functions(llama / "predictor.mlpackage")["predict_0"]["outputs"]["mask"]
    assert mask == {"dtype": "float16", "shape": [1, 896]}


def test_states_are_read_once(llama):
    for name in ("decode", "prefill"):
        reads = [op for op in Package(llama / "decoder.mlpackage").function(name)._steps
                 if op[0].op_type == "read_state"]  # fmt: skip
        assert len(reads) == 2


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = checkpoint(tmp_path / "model", tie_word_embeddings=True)
    first, second = make(model, tmp_path / "a"), make(model, tmp_path / "b")
    assert manifest.read(first)["files"] == manifest.read(second)["files"]


def test_a_large_model_is_cut_into_packages(tmp_path):
    for name, tied in (("tied", True), ("untied", False)):
        model = checkpoint(tmp_path / name, tie_word_embeddings=tied, layers=3)
        whole, cut = tmp_path / f"{name}-whole", tmp_path / f"{name}-cut"
        make(model, whole)
        make(model, cut, part_bytes=190_000)
        content = manifest.read(cut)
        assert len(content["dense"]["packages"]) > 2
        for entry in content["dense"]["packages"].values():
            weights = cut / entry["file"] / "Data/com.apple.CoreML/weights/weight.bin"
            assert weights.stat().st_size < 190_000
        tokens = tokenizer.sample(model, 70)
        found = [dense_runner(out, manifest.read(out)).prompt(tokens) for out in (whole, cut)]
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    "quant", ["int4", *(pytest.param(q, marks=pytest.mark.whole) for q in ("int8", "palette4"))]
)
def test_quantised_exports_compute_what_their_weights_say(quant, tmp_path):
    model = FIXTURES / "opt-austen"
    out = tmp_path / "out"
    found = measured(model, out, quant=quant, context=QUICK)
    # How far 4 bits are from 16 depends on the model; what the export adds does not.
    assert not [line for line in found.failed if "stored weights" in line]
    file = out / "decoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    bits = file.stat().st_size * 8 / manifest.read(out)["architecture"]["parameters"]
    assert bits < {"int8": 9.0, "int4": 5.5, "palette4": 5.5}[quant]
    assert not (out / calibrate_module.CODES).exists()


@pytest.mark.whole
def test_calibrated_rounding_is_nearer_to_the_model_in_both_profiles(tmp_path, capsys):
    model = FIXTURES / "llama-relu-austen"
    asked = {"quant": "int8", "context": QUICK}
    paged = asked | {"profiles": ("dense", "paged"), "cache_rows": 192}
    nearest = measured(model, tmp_path / "nearest", rounding="nearest", **asked)
    calibrated = measured(model, tmp_path / "calibrated", **paged)
    kl = [
        next(d.kl for _, against, d, _ in found.rows if against == "MLX float32")
        for found in (calibrated, nearest)
    ]
    assert kl[0] < 0.7 * kl[1]
    assert calibrated.failed == []
    again = make(model, tmp_path / "again", **asked)
    weights = [
        {k: v for k, v in manifest.read(out)["files"].items() if "decoder" in k}
        for out in (again, tmp_path / "calibrated")
    ]
    assert weights[0] == weights[1]
    code, _ = run(model, "--check", again, capsys=capsys)  # by the codes in the packages
    assert code == 0


def test_rows_of_int8_for_ios_26(tmp_path):
    model = FIXTURES / "opt-austen"
    asked = {"profiles": ("dense", "paged"), "rows": "int8", "target": "iOS26"}
    asked |= {"context": QUICK}
    out = make(model, tmp_path / "out", **asked)
    assert report(model, out, **asked).failed == []
    inputs = manifest.functions(out / "paged.mlpackage")["ffn_rows_64"]["inputs"]
    assert inputs["rows"] == {"dtype": "int8", "shape": [64, 2 * 128]}
    assert inputs["extra"] == {"dtype": "float16", "shape": [64, 3]}
    stride = manifest.read(out)["paged"]["rows"]["stride"]
    assert stride == 512  # half of what float16 takes


def test_a_table_mixes_schemes(tmp_path):
    (tmp_path / "table.json").write_text('{"*self_attn*": "int8", "*embed*": "fp16"}')
    chosen = settings(quant="int4", table=tmp_path / "table.json")
    model = checkpoint(tmp_path / "model")
    export(model, tmp_path / "out", chosen)
    program = Package(tmp_path / "out/decoder.mlpackage")
    kinds = {}
    for op in operations(program._spec, "decode"):
        if op.type.startswith("constexpr"):
            data = op.inputs["data"].arguments[0].value.type.tensorType.dataType
            kinds.setdefault(data, []).append(op.outputs[0].name)
    eight, four = sorted(kinds.values(), key=lambda names: "self_attn" not in names[0])
    assert all("self_attn" in name for name in eight)
    assert not any("embed" in name for names in kinds.values() for name in names)
    assert all("mlp" in name or "lm_head" in name for name in four)


def test_a_model_directory_exports_as_its_checkpoint(tmp_path):
    from mlx_flash.conversion.convert import convert

    model = FIXTURES / "opt-austen"
    directory = convert(str(model), str(tmp_path / "dir"))
    first, second = make(model, tmp_path / "a"), make(directory, tmp_path / "b")
    packages = [{k: v for k, v in manifest.read(out)["files"].items() if "decoder" in k}
                for out in (first, second)]  # fmt: skip
    assert packages[0] == packages[1]


@pytest.mark.whole
def test_trained_predictors_say_what_mlx_flash_says(tmp_path, capsys):
    from mlx_flash.calibration.calibrate import calibrate
    from mlx_flash.conversion.convert import convert

    directory = convert(str(FIXTURES / "llama-relu-austen"), str(tmp_path / "dir"))
    calibrate(directory, tokens=1024, rank=16)
    asked = {"profiles": ("paged",), "predictor": "trained", "context": QUICK, "cache_rows": 192}
    found = measured(directory, tmp_path / "out", **asked)
    assert found.failed == []
    share = found.facts["predictor masks that agree with MLX's (cache)"]
    assert float(share.rstrip("%")) >= 99.9
    content = manifest.read(tmp_path / "out")["paged"]
    assert "low-rank" in content["predictors"] and not content["exact"]
    # By the predictors that are in it; ReLU's exact one, which is the default, has other masks.
    code, said = run(directory, "--check", tmp_path / "out", capsys=capsys)
    assert code == 0, said


def run(*args, capsys):
    code = cli.main([str(a) for a in args])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return code, said


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--context", "100"], "context of 100 tokens; expected a multiple of 32, at least 64"),
        (["--context", "40"], "context of 40 tokens; expected a multiple of 32, at least 64"),
        (["--context", "0"], "context of 0 tokens; expected a multiple of 32, at least 64"),
        (["--quant", "int4", "--units", "all"], "Neural Engine refuses"),
        (["--target", "iOS17"], "iOS18, iOS26"),
        (["--profile", "sparse"], "profiles sparse; expected some of dense, paged"),
        (["--profile", ","], "profiles none; expected some of dense, paged"),
        (["--profile", "paged"], "no trained predictors"),
        (["--profile", "paged", "--predictor", "exact"], "no zeros"),
        (["--quant-table", "/nowhere"], "not a table"),
        (["--part-size", "0.00001"], "no package may go above"),
        (["--cache-rows", "0"], "--cache-rows is 0; expected 1 or more"),
        (["--rows", "int8"], "--target iOS26"),
    ],
)
def test_what_cannot_be_done_is_refused(flags, said, small, tmp_path, capsys):
    code, message = run(small, "-o", tmp_path / "out", "--no-verify", *flags, capsys=capsys)
    assert code == 2
    assert said in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_core_ml_itself_runs_on_macos_only(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Linux")
    code, said = run(small, "-o", tmp_path / "out", "--coreml", capsys=capsys)
    assert code == 2
    assert "--check OUT --coreml" in said


def test_what_is_there_is_not_overwritten(small, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    code, said = run(small, "-o", tmp_path / "out", capsys=capsys)
    assert code == 2 and "exists" in said


def test_a_full_disk_is_refused_beforehand(small, tmp_path, capsys, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda path: usage(100, 100, 0))
    code, said = run(small, "-o", tmp_path / "out", capsys=capsys)
    assert code == 2 and "not enough disk" in said


def test_a_model_that_cannot_be_read_is_not_told_as_a_full_disk(
    small, tmp_path, capsys, monkeypatch
):
    def fail(*_):
        raise ReadError(5, f"reading {small}, layer 1: Input/output error")

    monkeypatch.setattr(Source, "take", fail)
    code, said = run(small, "-o", tmp_path / "out", capsys=capsys)
    assert code == 1
    assert f"reading {small}, layer 1: Input/output error" in said and "writing" not in said
    assert not (tmp_path / "out.partial").exists()


def test_unknown_architectures_and_activations_are_refused(tmp_path, capsys):
    for model_type, said in (("gemma", "expected one of"), ("gpt2", "expected one of")):
        model = checkpoint(tmp_path / model_type, model_type)
        code, message = run(model, "-o", tmp_path / "out", capsys=capsys)
        assert code == 2 and said in message
    model = checkpoint(tmp_path / "strange")
    config = json.loads((model / "config.json").read_text()) | {"hidden_act": "mish"}
    (model / "config.json").write_text(json.dumps(config))
    code, message = run(model, "-o", tmp_path / "out", capsys=capsys)
    assert code == 2 and "mish" in message


def test_a_missing_tokenizer_is_refused(tmp_path, capsys):
    model = checkpoint(tmp_path / "model")
    (model / "tokenizer.json").unlink()
    code, said = run(model, "-o", tmp_path / "out", capsys=capsys)
    assert code == 2 and "no tokenizer" in said
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_json_is_made_from_sentencepiece(tmp_path):
    import sentencepiece

    text = tokenizer.TEXT.read_text(encoding="utf-8")[:60_000]
    (tmp_path / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    model = checkpoint(tmp_path / "model", vocab_size=400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    shutil.copy(tmp_path / "tokenizer.model", model)
    tokenizer.write(Source(model), tmp_path / "out")  # compares with sentencepiece
    words = "He walked to Lyme."
    old = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    found = tokenizer.load(tmp_path / "out").encode(words, add_special_tokens=False).ids
    assert found == old.encode(words)


def test_an_export_is_checked_again(tmp_path, capsys):
    model = checkpoint(tmp_path / "model")
    out = make(model, tmp_path / "out")
    code, _ = run(model, "--check", out, capsys=capsys)
    assert code == 0
    other = checkpoint(tmp_path / "other", seed=1)
    code, said = run(other, "--check", out, capsys=capsys)
    assert code == 1 and "does not compute" in said
    (out / "tokenizer/tokenizer.json").unlink()
    code, said = run(model, "--check", out, capsys=capsys)
    assert code == 1 and "missing" in said


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path, capsys):
    model = checkpoint(tmp_path / "model")
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e6
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    code, said = run(model, "-o", tmp_path / "out", "--no-verify", capsys=capsys)
    assert code == 2 and "up_proj" in said and "65504" in said
    assert not (tmp_path / "out.partial").exists()
