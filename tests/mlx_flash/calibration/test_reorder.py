"""Reordering rows: the model stays the same, everything that counts rows moves along."""

import errno
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from support.tiny import make_checkpoint
from support.tiny_mixtures import make_mixture

from mlx_flash import cli
from mlx_flash.calibration.reorder import ordering, reorder, rewriting
from mlx_flash.calibration.reorder.resident_tensors import write_permuted
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import (
    CalibrationError,
    ConvertError,
    DamagedError,
    FlashError,
    ModelError,
    PredictorError,
)
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors
from mlx_flash.runtime.load import load, load_model
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.read_requests import (
    SCATTER_ROWS,
    STAGED_SHARE,
    gap_bytes,
    plan,
    plan_scattered,
)

FIXTURES = Path(__file__).parents[2] / "fixtures"
TOKENS = 1024
# Family, what makes it so, whether it is quantised, kind of predictors to put in.
KINDS = {
    "ungated, biases": ("opt", {}, False, None),
    "gated, biases": ("llama", {"hidden_act": "relu", "mlp_bias": True}, False, None),
    "norm inside": ("nanochat", {}, False, None),
    "quantised": ("llama", {"hidden_act": "relu", "mlp_bias": True}, True, None),
    "low-rank": ("opt", {}, False, "low-rank"),
    "quantised, low-rank": ("llama", {"hidden_act": "relu"}, True, "low-rank"),
    "threshold": ("llama", {"mlp_bias": True}, False, "threshold"),
    "fused, threshold": ("phi3", {}, False, "threshold"),
}


def make(path, family="opt", overrides=None, quantize=False, predictors=None):
    source = make_checkpoint(path / "hf", family, "float32", layers=2, **(overrides or {}))
    out = convert(source, path / "flash", quantize=quantize)
    if predictors:
        put_predictors(out, predictors)
    return out


def put_predictors(path, kind):
    """Predictors of random numbers, different ones for each row."""
    directory, random = ModelDirectory(path), np.random.default_rng(1)

    def normal(*shape):
        return mx.array(random.standard_normal(shape, np.float32))

    layers = []
    for layer in directory.rows.layers:
        rows = layer.rows
        tensors = {"first": normal(8, directory.d_model), "second": normal(rows, 8)}
        if kind == "low-rank":
            tensors["bias"] = normal(rows)
        else:
            tensors |= {"scale": mx.abs(normal(rows)), "floor": mx.abs(normal(rows))}
        layers.append(LayerPredictor(kind, 0.5 if kind == "low-rank" else 0.2, tensors=tensors))
    predictor_file.write(
        path / predictor_file.NAME, Predictors(kind, directory.rows.fingerprint, layers)
    )


def logits(path, **how):
    """Of some tokens one by one, so that predictors are asked."""
    model = load_model(ModelDirectory(path), PagingOptions(**how))
    tokens = np.random.default_rng(0).integers(3, 256, 24).tolist()
    cache = make_prompt_cache(model)
    found = [model(mx.array([[token]]), cache=cache)[0].astype(mx.float32) for token in tokens]
    found = mx.concatenate(found)
    mx.eval(found)
    if how.get("use_flash", True):
        model.flash.close()
    return found


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def moved_rows(path):
    tensors = mx.load(str(path / rewriting.NAME))
    return [np.array(tensors[f"layers.{i}.order"]) for i in range(len(tensors))]


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    """A tiny OPT, and the same reordered."""
    path = tmp_path_factory.mktemp("opt")
    source = make(path)
    reorder.reorder(source, path / "out", tokens=TOKENS)
    return source, path / "out"


@pytest.fixture
def copy(opt, tmp_path):
    return Path(shutil.copytree(opt[0], tmp_path / "copy"))


@pytest.mark.parametrize(
    "kind",
    [
        kind if n % 4 == 0 else pytest.param(kind, marks=pytest.mark.whole)
        for n, kind in enumerate(KINDS)
    ],
)
def test_the_model_is_the_same(tmp_path, kind):
    family, overrides, quantize, predictors = KINDS[kind]
    source = make(tmp_path, family, overrides, quantize, predictors)
    before = content(source)
    found = reorder.reorder(source, tmp_path / "out", tokens=TOKENS)
    assert content(source) == before
    assert found["predictor"] == (predictors or ("up" if family != "llama" else "gate"))
    directory = ModelDirectory(tmp_path / "out")
    assert not list(directory.verify())
    for how in ({"use_flash": False}, {"cache_share": 0.3}):
        expected = logits(source, **how)
        worst = mx.abs(logits(tmp_path / "out", **how) - expected).max().item()
        assert worst <= 1e-5 * max(1, mx.abs(expected).max().item()), how
    orders = moved_rows(tmp_path / "out")
    old, new = ModelDirectory(source).rows, directory.rows
    for a, b, order in zip(old.layers, new.layers, orders, strict=True):
        assert not np.array_equal(order, np.arange(a.rows))
        rows = [
            np.memmap(file.path, np.uint8, "r", x.offset, (x.rows, x.layout.stride))
            for file, x in ((old, a), (new, b))
        ]
        assert np.array_equal(rows[0][order], rows[1])


def test_greedy_tokens_of_a_trained_model(tmp_path):
    """96 of 96, every row that fires known beforehand; fewer requests for rows unseen."""
    path = convert(FIXTURES / "llama-relu-austen", tmp_path / "flash", dtype="float32")
    dense, tokenizer = load(path, use_flash=False)
    prompt = mx.array(tokenizer.encode("She had been some minutes in the room before"))

    def greedy(model):
        return [token for token, _ in generate_step(prompt, model, max_tokens=96)]

    expected = greedy(dense)
    found = reorder.reorder(path, tokens=1024)
    assert found["written"] == str(path)
    assert found["after"]["rows"] == found["before"]["rows"]
    assert found["after"]["requests"] < 0.97 * found["before"]["requests"]
    model = load_model(ModelDirectory(path), PagingOptions(cache_share=0.15))
    assert model.flash.selection.exact
    assert greedy(model) == expected


def test_rows_that_fire_together_come_together():
    random = np.random.default_rng(0)
    group = random.permutation(np.repeat(np.arange(16), 8))  # of 128 rows, 16 groups
    fires = random.random((600, 16)) < 0.2
    active = fires[:, group] & (random.random((600, 128)) < 0.9)
    active[:, 5] = False
    order = ordering.by_coactivation(active)
    assert ordering.is_order(order, 128)
    assert order[-1] == 5, "what never fires comes last"
    groups = group[order[:-1]]
    assert int((np.diff(groups) != 0).sum()) == 15
    wanted = [np.flatnonzero(bits) for bits in active[:100]]
    before = ordering.reads(wanted, np.arange(128), 4096, 0, 1 << 20)
    after = ordering.reads(wanted, order, 4096, 0, 1 << 20)
    assert after.rows == before.rows and after.bytes == before.bytes
    assert after.requests < 0.5 * before.requests


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_any_bits_give_an_order(rows, share):
    active = np.random.default_rng(0).random((50, rows)) < share
    assert ordering.is_order(ordering.by_coactivation(active), rows)


def test_reads_are_those_of_the_plan():
    wanted = [np.array([0, 2, 9]), np.array([5])]
    order = np.array([0, 9, 2, 1, 3, 4, 5, 6, 7, 8])
    near = ordering.reads(wanted, order, 1000, 0, 1 << 20, skipped=100)
    assert (near.rows, near.requests, near.bytes) == (2, 1, (2900 + 900) / 2)
    apart = ordering.reads(wanted, np.arange(10), 1000, 1, 1 << 20)
    assert (apart.requests, apart.bytes) == (1.5, (3000 + 1000 + 1000) / 2)


def test_gap_of_a_disk():
    assert gap_bytes(20e-6, 1e9) == 20_000
    assert gap_bytes(0, 1e9) == 0
    assert len(plan(np.array([0, 2, 9]), max_rows=64, gap=gap_bytes(20e-6, 1e9) // 16384)) == 2
    for wrong in ((-1, 1), (1, 0), (float("nan"), 1)):
        with pytest.raises(ValueError, match="not negative"):
            gap_bytes(*wrong)


def test_a_fused_bias_has_two_numbers_a_row(tmp_path):
    path = tmp_path / "w.safetensors"
    bias, other = mx.arange(12), mx.arange(6)
    mx.save_safetensors(str(path), {"bias": bias.astype(mx.float16), "other": other})
    write_permuted(path, {"bias": 0, "elsewhere": 0}, [np.array([2, 0, 1, 5, 4, 3])])
    found = mx.load(str(path))
    assert found["bias"].tolist() == [2, 0, 1, 5, 4, 3, 8, 6, 7, 11, 10, 9]
    assert found["other"].tolist() == other.tolist()


def test_twice(copy, opt):
    """The same again is told; another text moves rows on from where they are."""
    args = ["reorder", "--model", str(copy), "--tokens", str(TOKENS)]
    assert cli.main(args) == 0
    assert content(copy) == content(opt[1])
    found = reorder.reorder(copy, tokens=TOKENS)
    assert found["done_before"] and found["written"] is None
    assert content(copy) == content(opt[1])
    reorder.reorder(copy, tokens=TOKENS, seed=1, data=None)
    assert not list(ModelDirectory(copy).verify())
    old, new = ModelDirectory(opt[0]).rows, ModelDirectory(copy).rows
    for a, b, order in zip(old.layers, new.layers, moved_rows(copy), strict=True):
        shape = (a.rows, a.layout.stride)
        first = np.memmap(old.path, np.uint8, "r", a.offset, shape)
        assert np.array_equal(first[order], np.memmap(new.path, np.uint8, "r", b.offset, shape))


def test_command_line(copy, capsys):
    before = content(copy)
    args = ["reorder", "--model", str(copy), "--tokens", str(TOKENS)]
    assert cli.main([*args, "--dry-run"]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert content(copy) == before
    assert cli.main([*args, "--json", "--out", str(copy.parent / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == str(copy.parent / "out")
    assert found["after"]["requests"] > 0
    assert [file.name for file in sorted(copy.parent.iterdir())] == ["copy", "out"]
    assert cli.main(["verify", "--model", found["written"]]) == 0
    assert cli.main(["inspect", "--model", found["written"]]) == 0
    assert "reordered: by what 1024 tokens" in capsys.readouterr().out
    assert cli.main(["inspect", "--model", str(copy)]) == 0
    assert "reordered" not in capsys.readouterr().out


def test_models_whose_order_does_not_matter(tmp_path):
    mixture = convert(make_mixture(tmp_path / "a", "mixtral"), tmp_path / "mixture")
    with pytest.raises(ModelError, match="experts, each read by requests of its own"):
        reorder.reorder(mixture)
    whole = convert(make_checkpoint(tmp_path / "b", layers=2), tmp_path / "whole", quantize=True)
    with pytest.raises(ModelError, match="whole layers"):
        reorder.reorder(whole)
    swiglu = convert(make_checkpoint(tmp_path / "b", layers=2), tmp_path / "swiglu")
    with pytest.raises(PredictorError, match="calibrate --kind threshold"):
        reorder.reorder(swiglu)


def test_bad_input(copy, tmp_path, capsys):
    before = content(copy)
    with pytest.raises(ModelError, match="no such model directory"):
        reorder.reorder(tmp_path / "nothing")
    with pytest.raises(ConvertError, match="exists; choose another --out"):
        reorder.reorder(copy, tmp_path)
    with pytest.raises(CalibrationError, match="at least 1024"):
        reorder.reorder(copy, tokens=10)
    with pytest.raises(CalibrationError):
        reorder.reorder(copy, data=tmp_path / "no.txt", tokens=TOKENS)
    with pytest.raises(FlashError, match="too small"):
        reorder.reorder(copy, tokens=TOKENS, ram="1MB")
    assert cli.main(["reorder", "--model", str(copy), "--ram", "much"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert content(copy) == before


def test_what_is_in_the_way(copy, tmp_path):
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ConvertError, match=r"did not write \(notes.txt\)"):
        reorder.reorder(copy, tokens=TOKENS)
    assert reorder.reorder(copy, tmp_path / "out", tokens=TOKENS)["written"]
    (copy / "notes.txt").unlink()
    link = tmp_path / "link"
    link.symlink_to(copy)
    with pytest.raises(ConvertError, match="give the directory itself"):
        reorder.reorder(link, tokens=TOKENS)


def test_damage_is_found_before_it_gets_a_new_hash(copy, tmp_path):
    rows = ModelDirectory(copy).rows
    with open(rows.path, "r+b") as f:
        f.seek(rows.layers[1].offset + 100)
        byte = f.read(1)
        f.seek(-1, 1)
        f.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DamagedError, match="layer 1 of"):
        reorder.reorder(copy, tmp_path / "out", tokens=TOKENS)
    assert not (tmp_path / "out").exists()


def test_predictors_of_another_model(copy):
    put_predictors(copy, "low-rank")
    file = copy / predictor_file.NAME
    found = predictor_file.read(file, ModelDirectory(copy).rows.fingerprint, [160, 160], 64)
    found.rows_fingerprint = "0" * 64
    mx.eval([layer.tensors for layer in found.layers])
    predictor_file.write(file, found)
    with pytest.raises(PredictorError, match="calibrate again"):
        reorder.reorder(copy, tokens=TOKENS)


@pytest.mark.parametrize("moment", ["a layer", "files", "the first rename", "the second rename"])
def test_interrupted(copy, opt, monkeypatch, moment):
    """The old directory stays whole, and the same call goes on."""
    before, calls = content(copy), []
    with monkeypatch.context() as patch:
        if moment == "a layer":
            real = rewriting.moved

            def moved(reader, layer, order):
                if layer:
                    raise KeyboardInterrupt
                return real(reader, layer, order)

            patch.setattr(rewriting, "moved", moved)
        elif moment == "files":

            def full(path, _):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

            patch.setattr(
                rewriting, "write_config", lambda *_: (_ for _ in ()).throw(OSError(28, ""))
            )
        else:
            real_rename = Path.rename

            def rename(self, other):
                calls.append(self)
                # A kill cannot undo: neither may the way back.
                if moment == "the first rename" or len(calls) > 1:
                    raise KeyboardInterrupt
                return real_rename(self, other)

            patch.setattr(Path, "rename", rename)
        with pytest.raises((KeyboardInterrupt, FlashError)):
            reorder.reorder(copy, tokens=TOKENS)
    if moment == "the second rename":
        assert content(copy.with_name("copy.replaced")) == before
    else:
        assert content(copy) == before
    recorded = []
    monkeypatch.setattr(ordering, "by_coactivation", lambda _: recorded.append(1))
    assert reorder.reorder(copy, tokens=TOKENS)["written"]
    assert not recorded, "what was found is not sought again"
    assert content(copy) == content(opt[1])
    assert [file.name for file in copy.parent.iterdir()] == ["copy"]


def test_full_disk(copy, monkeypatch):
    before = content(copy)
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(ConvertError, match=r"not enough disk for .*another --out"):
        reorder.reorder(copy, tokens=TOKENS)
    assert content(copy) == before
    assert [file.name for file in copy.parent.iterdir()] == ["copy"]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 1])
def test_long_requests_are_mostly_wanted(share):
    """Every row is read once; what is joined across gaps stays short, or is worth staging."""
    rows = np.flatnonzero(np.random.default_rng(0).random(500) < share)
    few, long = plan_scattered(rows, max_rows=100, gap=10)
    found = [row for one in few + long for row in rows[one.first : one.last].tolist()]
    assert sorted(found) == rows.tolist()
    for one in few + long:
        assert (one.start, one.stop) == (rows[one.first], rows[one.last - 1] + 1)
        assert one.stop - one.start <= 100
    assert all(one.stop - one.start <= SCATTER_ROWS for one in few)
    assert all(one.last - one.first >= STAGED_SHARE * (one.stop - one.start) for one in long)
    assert bool(long) == (share >= 0.3)
    assert len(few) + len(long) < rows.size
