"""Loading, ``plan``, ``inspect``, ``bench`` and the trial run agree on every byte of a plan.

Over random models of every kind (dense, with exact and trained predictors, mixtures with and
without measured demand, layer rows) and random budgets from below the least to beyond everything.
"""

import io
import json
import random

import mlx.core as mx
import pytest
from support.platforms import fix_memory
from support.tiny import make_checkpoint
from support.tiny_mixtures import make_mixture
from support.trained import whole_rank

from mlx_flash import cli
from mlx_flash.common.sizes import show, with_margin
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import BudgetError
from mlx_flash.model_directory import expert_demand_file
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.model_directory.expert_demand_file import ExpertDemand
from mlx_flash.paging import row_stream
from mlx_flash.performance import bench, bench_worker, trial_run
from mlx_flash.performance.budget_forecast import BudgetForecast
from mlx_flash.performance.inspection import describe
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.options import PagingOptions

PROCESS = 100_000_000
BUDGETS = 4  # of each model


def dense(path, rng, activation):
    sizes = {"intermediate_size": rng.choice([512, 1024, 2048]), "hidden_size": 128}
    sizes |= {"vocab_size": rng.choice([300, 4000]), "hidden_act": activation}
    source = make_checkpoint(
        path / "hf", "llama", "float32", layers=rng.randint(1, 12), head_dim=32, **sizes
    )
    return convert(source, path / "flash")


def swiglu(path, rng):
    return dense(path, rng, "silu")


def relu(path, rng):
    return dense(path, rng, "relu")


def low_rank(path, rng):
    out = relu(path, rng)
    predictor_file.write(out / predictor_file.NAME, whole_rank(ModelDirectory(out)))
    return out


def layers(path, rng):
    """Quantised in groups that span neurons: a row is a whole layer."""
    source = make_checkpoint(path / "hf", "llama", "float32", layers=rng.randint(3, 9))
    return convert(source, path / "flash", quantize=True, q_group_size=32)


def mixture(path, rng):
    source = make_mixture(path / "hf", "mixtral", num_hidden_layers=rng.randint(1, 4))
    return convert(source, path / "flash")


def measured_mixture(path, rng):
    out = mixture(path, rng)
    rows = ModelDirectory(out).rows
    curves = tuple(
        tuple(sorted((2 * rng.random() for _ in range(layer.rows + 1)), reverse=True))
        for layer in rows.layers
    )
    demand = ExpertDemand(rows.fingerprint, True, curves, {"tokens": 1, "text": "t", "gain": 0.1})
    expert_demand_file.write(out / expert_demand_file.NAME, demand)
    return out


KINDS = (swiglu, relu, low_rank, layers, mixture, measured_mixture)


def models():
    """Each kind twice; make test has one of the two."""
    for kind in KINDS:
        yield pytest.param((kind, 0), id=f"{kind.__name__}-0")
        yield pytest.param((kind, 1), id=f"{kind.__name__}-1", marks=pytest.mark.whole)


@pytest.fixture(scope="module", params=models())
def made(request, tmp_path_factory):
    """(model directory, random numbers)."""
    kind, seed = request.param
    rng = random.Random(f"{kind.__name__} {seed}")
    return kind(tmp_path_factory.mktemp("model"), rng), rng


@pytest.fixture(autouse=True)
def steady(monkeypatch, tmp_path):
    """A process that takes the same whenever it is asked, and a cache of its own."""
    fix_memory(monkeypatch, PROCESS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def choices(directory, rng):
    """Options to try: the default, and one that this model can be run with, too."""
    other = {"predictor": rng.choice(["auto", "none"])}
    if directory.unit == "neuron" and directory.ffn.activation == "relu":
        other["predictor"] = "gate"
    return [PagingOptions(context=64), PagingOptions(context=rng.choice([16, 500]), **other)]


def test_all_agree(made):
    path, rng = made
    directory = ModelDirectory(path)
    for options in choices(directory, rng):
        forecasts = BudgetForecast(directory, options)
        least, most = forecasts.least, forecasts.most
        if options.predictor == "auto":
            info = describe(directory, options)
            assert (info["least_bytes"], info["dense_bytes"]) == (least, most)
            for row in info["budgets"]:
                compare_row(row, forecasts.plan(row["ram_bytes"]))
            assert not info["budgets"] or info["budgets"][0]["ram_bytes"] == least
        assert bench.sweep(forecasts, 1 << 50)[0] == least + bench.MARGIN
        assert trial_run.ways_within(forecasts.model, least)
        below = trial_run.ways_within(forecasts.model, least - 2 * 10**6)
        # A predictor that was named rules streaming out, but the trial times it for kept layers.
        assert set(below) <= ({"streamed"} if options.predictor == "gate" else set())
        for ram in [least, most, *(rng.randint(least, most + 10**6) for _ in range(BUDGETS))]:
            model = load_model(directory, options.replace(ram=ram))
            assert model.flash.plan == forecasts.plan(ram)
            assert model.flash.plan.total <= ram
            model.flash.close()
        too_small = least - 2 * 10**6
        with pytest.raises(BudgetError, match="too small") as planned:
            forecasts.plan(too_small)
        with pytest.raises(BudgetError) as loaded:
            load_model(directory, options.replace(ram=too_small))
        assert str(planned.value) == str(loaded.value)
        assert f"the least that works is {show(least)}:" in str(loaded.value)


def compare_row(row, plan):
    assert row["kept_layers"] == len(plan.kept)
    assert row["cached_rows"] == sum(plan.slots.values())
    assert row["prompt_chunk_tokens"] == plan.step
    assert row["kept_bytes"] == plan.bytes_of("kept_rows")


@pytest.mark.parametrize("kind", [relu, measured_mixture, layers])
def test_commands_agree(tmp_path, capsys, monkeypatch, kind):
    """What ``plan --json`` prints and what a run of ``bench`` says, against loading."""
    monkeypatch.setattr(BudgetForecast, "measure", lambda *_: None)
    monkeypatch.setattr("mlx_flash.cli.plan.describe", described)
    rng = random.Random(1)
    path = kind(tmp_path / "model", rng)
    directory = ModelDirectory(path)
    options = PagingOptions(context=20)
    forecasts = BudgetForecast(directory, options)
    capsys.readouterr()  # mlx-lm says how it quantised
    for ram in (forecasts.least, (forecasts.least + forecasts.most) // 2, forecasts.most):
        model = load_model(directory, options.replace(ram=ram))
        plan = model.flash.plan
        model.flash.close()
        flags = ["--model", str(path), "--ram", str(ram), "--context", "20", "--json"]
        assert cli.main(["plan", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == {"planned_bytes": plan.to_json(), "least_bytes": forecasts.least}
        settings = {"model": str(path), "prompt_tokens": 4, "gen_tokens": 2, "repeats": 1}
        run = bench_worker.run(
            settings | {"options": options.replace(ram=ram).to_json()}, io.StringIO()
        )
        assert (run["kept_layers"], run["streamed_layers"]) == (len(plan.kept), len(plan.streamed))
        assert run["cached_rows"] == sum(plan.slots.values())
        assert run["prompt_chunk_tokens"] == plan.step


def described(forecasts, ram):
    """The part of the command's figures that nothing has to be measured for."""
    return {"planned_bytes": forecasts.plan(ram).to_json(), "least_bytes": forecasts.least}


def test_inspect_says_what_predictors_need(tmp_path, monkeypatch):
    """With predictors a model runs in less than streaming takes, and ``inspect`` says so."""
    monkeypatch.setattr(row_stream, "LEAST_BYTES", 0)  # a layer larger than its buffers
    source = make_checkpoint(
        tmp_path / "hf", "llama", "float32", layers=8, hidden_size=256, head_dim=64,
        intermediate_size=4096, hidden_act="relu",
    )  # fmt: skip
    directory = ModelDirectory(convert(source, tmp_path / "flash"))
    tensors = {"first": mx.zeros((4, 256)), "second": mx.zeros((4096, 4)), "bias": mx.ones(4096)}
    fitted = [LayerPredictor("low-rank", 0.5, "none", tensors, {"4": 100.0})] * 8
    predictor_file.write(
        directory.path / predictor_file.NAME,
        Predictors("low-rank", directory.rows.fingerprint, fitted, {}),
    )
    options = PagingOptions(context=64)
    info = describe(directory, options)
    ways = trial_run.way_budgets(BudgetForecast(directory, options).needs)
    assert info["least_bytes"] == with_margin(ways["paged"]) < ways["streamed"]
    load_model(directory, options.replace(ram=info["least_bytes"])).flash.close()
    assert info["budgets"][0]["cached_rows"] > 0
