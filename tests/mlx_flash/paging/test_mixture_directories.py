"""Mixtures that are refused, and why; directories of odd ones."""

import json

import mlx.core as mx
import pytest
from mlx_lm import utils
from support.checkpoints import dense_of, edit_config, edit_weights
from support.parity import LONG, assert_slots_hold_their_rows, greedy, logits
from support.platforms import fix_memory
from support.tiny import make_checkpoint
from support.tiny_mixtures import EXPERTS, make_mixture

from mlx_flash import cli
from mlx_flash.calibration.calibrate import calibrate
from mlx_flash.common.sizes import with_margin
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import (
    BudgetError,
    CalibrationError,
    DamagedError,
    ModelError,
    PredictorError,
)
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.mixtures import ALIASES, MIXTURES
from mlx_flash.performance.inspection import describe
from mlx_flash.runtime.load import load, load_model
from mlx_flash.runtime.memory_plan import way_budgets
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader


@pytest.fixture
def source(tmp_path):
    return make_mixture(tmp_path / "hf", "mixtral", num_hidden_layers=2)


def test_unknown_mixture(source, tmp_path):
    """The known ones are listed, by every name."""
    edit_config(source, model_type="grok_moe")
    with pytest.raises(ModelError, match="'grok_moe'") as caught:
        convert(source, tmp_path / "out")
    assert all(name in str(caught.value) for name in {*MIXTURES, *ALIASES})


@pytest.mark.parametrize("said", [4, 9, 16])
def test_other_number_of_experts_than_the_file_has(source, tmp_path, said):
    edit_config(source, num_local_experts=said)
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "out")
    message = str(caught.value)
    assert str(source) in message
    if said < EXPERTS:
        assert "not expected: model.layers.0.block_sparse_moe.experts" in message or (
            "shape of model.layers.0.block_sparse_moe" in message
        )


@pytest.mark.parametrize("value", [0, -1, "8", None, 1.5])
def test_number_of_experts_that_makes_no_sense(source, tmp_path, value):
    edit_config(source, num_local_experts=value)
    with pytest.raises(ModelError, match=r"num_local_experts|config.json"):
        convert(source, tmp_path / "out")


def test_more_experts_per_token_than_experts(source, tmp_path):
    edit_config(source, num_experts_per_tok=9)
    with pytest.raises(ModelError):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
@pytest.mark.parametrize("expert", [0, 5, 7])
def test_missing_expert_tensor(source, tmp_path, expert, name):
    lost = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"
    edit_weights(source, lambda weights: weights.pop(lost))
    with pytest.raises(ModelError) as caught:
        convert(source, tmp_path / "out")
    message = str(caught.value)
    assert str(source) in message
    assert f"experts.{expert}.{name}" in message or "switch_mlp" in message
    assert not (tmp_path / "out").exists()


def test_experts_of_another_shape(source, tmp_path):
    def change(weights):
        for n in range(EXPERTS):
            name = f"model.layers.1.block_sparse_moe.experts.{n}.w1.weight"
            weights[name] = weights[name][:-1]

    edit_weights(source, change)
    with pytest.raises(ModelError, match=r"shape of model\.layers\.1\.\w+\.switch_mlp"):
        convert(source, tmp_path / "out")


def test_budget_below_one_layers_experts(source, tmp_path):
    directory = convert(source, tmp_path / "out")
    with pytest.raises(BudgetError, match="too small for this model; the least that works") as told:
        load(directory, ram="1MB")
    message = str(told.value)
    assert "cached experts" in message
    assert "row buffers" in message
    assert "predictors" not in message


@pytest.mark.parametrize("predictor", ["gate", "up", "low-rank", "threshold"])
def test_predictors_are_for_neurons(source, tmp_path, predictor):
    directory = convert(source, tmp_path / "out")
    with pytest.raises(PredictorError, match="mixture of experts"):
        load(directory, predictor=predictor)
    with pytest.raises(CalibrationError, match="whose router says which experts a token needs"):
        calibrate(directory, kind="low-rank")
    assert greedy(load(directory, predictor="none", cache_share=0.25)[0], 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_the_back_end_cannot_compute(tmp_path, dtype):
    """Said when loading, not in the middle of a token; dense or paged."""
    source = make_mixture(tmp_path / "hf", "mixtral", dtype, num_hidden_layers=2)
    directory = ModelDirectory(convert(source, tmp_path / "out"))
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("a back end that computes them")
    for use_flash in (True, False):
        with pytest.raises(ModelError, match="in float32 only; convert with --dtype float32"):
            load_model(directory, PagingOptions(use_flash=use_flash))


def test_what_the_back_end_cannot_compute_in_one_layer(tmp_path):
    """The experts of the other layers are quantised."""
    source = make_mixture(tmp_path / "hf", "mixtral", "bfloat16", num_hidden_layers=2)
    model, config = utils.load_model(source)

    def choose(path, module):
        return hasattr(module, "to_quantized") and "layers.0" not in path

    model, config = utils.quantize_model(model, config, 64, 4, quant_predicate=choose)
    utils.save(tmp_path / "mixed", source, model, utils.load_tokenizer(source), config)
    directory = ModelDirectory(convert(tmp_path / "mixed", tmp_path / "out"))
    if mx.default_device().type != mx.DeviceType.cpu:
        pytest.skip("a back end that computes them")
    with pytest.raises(ModelError, match="in float32 only; convert with --dtype float32"):
        load_model(directory)


def test_no_such_cache_share(source, tmp_path):
    directory = ModelDirectory(convert(source, tmp_path / "out"))
    for share in (0, -0.1, 1.5):
        with pytest.raises(BudgetError, match="cache_share"):
            load_model(directory, PagingOptions(cache_share=share))
    with pytest.raises(BudgetError, match="kept_share is for models without experts"):
        load_model(directory, PagingOptions(kept_share=0.5))


# Directories of mixtures


def test_experts_of_different_layouts(tmp_path, reads):
    """Experts of one layer in 8 bits, of the others in 4, as mixed recipes leave them."""
    source = make_mixture(tmp_path / "hf", "mixtral", num_hidden_layers=3)
    model, config = utils.load_model(source)

    def choose(path, module):
        if not hasattr(module, "to_quantized"):
            return False
        return {"bits": 8, "group_size": 32} if "layers.1" in path else True

    model, config = utils.quantize_model(model, config, 64, 4, quant_predicate=choose)
    utils.save(tmp_path / "mixed", source, model, utils.load_tokenizer(source), config)
    directory = ModelDirectory(convert(tmp_path / "mixed", tmp_path / "flash"))
    assert len(directory.rows.layouts) == 2
    dense = dense_of(tmp_path / "mixed")
    for share in (0.01, 0.25, 0.5, 1.0):
        paged = load_model(directory, PagingOptions(cache_share=share))
        assert mx.array_equal(logits(paged), logits(dense))
        assert greedy(paged, 64) == greedy(dense, 64)
        assert greedy(paged, 8, prompt=LONG) == greedy(dense, 8, prompt=LONG)
        assert_slots_hold_their_rows(paged)
        paged.flash.close()


def test_damage_is_named(source, tmp_path):
    """A flipped bit in an expert is found by verify, which names its layer."""
    out = convert(source, tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["flash"]["unit"] == "expert"
    directory = ModelDirectory(out)
    assert list(directory.verify()) == []
    data = bytearray(directory.rows.path.read_bytes())
    data[directory.rows.layers[1].offset + 777] ^= 1
    directory.rows.path.write_bytes(data)
    (error,) = directory.verify()
    assert isinstance(error, DamagedError)
    assert "layer 1" in str(error)


def test_matrices_left_as_floats(tmp_path, capsys):
    """Where groups do not divide a matrix mlx-lm leaves it as floats; convert says so."""
    source = make_mixture(tmp_path / "hf", "mixtral", "bfloat16", intermediate_size=96)
    out = tmp_path / "out"
    args = ["--model", str(source), "--mlx-path", str(out), "-q", "--q-group-size", "64"]
    assert cli.main(["convert", *args]) == 0
    assert "Left as floats" in (said := capsys.readouterr().out) and "down_proj" in said
    with pytest.raises(ModelError, match="float32 only"):
        load(out)


def test_inspect_says_what_generate_takes(tmp_path, monkeypatch):
    """The least budget of a mixture is that of its slots, not of whole layers in turn."""
    fix_memory(monkeypatch, 100_000_000)
    directory = ModelDirectory(convert(make_mixture(tmp_path / "hf", "mixtral"), tmp_path / "out"))
    info = describe(directory)
    for row in info["budgets"]:
        assert row["streamed_bytes_per_token"] == 0
    reader = RowReader(directory.rows)
    needs = memory_requirements(directory, reader)
    reader.close()
    ways = way_budgets(needs)
    assert ways.keys() == {"paged", "resident"}
    assert info["least_bytes"] == with_margin(min(ways.values()))


def test_lookahead_where_there_is_nothing_to_look_for(tmp_path, capsys):
    dense = convert(make_checkpoint(tmp_path / "hf", "llama", "float32"), tmp_path / "dense")
    args = ["generate", "--model", str(dense), "--prompt", "x", "--lookahead"]
    assert cli.main(args) == 2
    assert "low-rank predictors and for mixtures" in capsys.readouterr().err
    assert cli.main([*args, "--policy", "window"]) == 2
    assert "--policy window" in capsys.readouterr().err
