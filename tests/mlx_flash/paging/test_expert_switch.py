"""Mixtures of experts, paged: mlx-lm's dense model of the same checkpoint says what is right.

Every family of the table that runs on the CPU, in float32, bfloat16, 4 and 8 bits, and 4 bits with
bfloat16 scales: logits of a prompt and of a step behind it are the dense model's to the bit, with
slots for a quarter, half and all of the experts. 96 greedy tokens are the same in float32 and 4
bits with slots for a quarter. The other types share all of that but the kernels: the
families of ``WANTED`` have 8 tokens with slots for a quarter, those of ``WHOLE``, one of each kind
of switch module, 128 with every number of slots; with ``--whole`` every family has.

Models have as many layers as it takes to have two with experts. MLX multiplies by chosen matrices
on the CPU in float32 only, unless they are quantised: for bfloat16 the tests put an equivalent
product in the place of ``mx.gather_mm``, for both models.

Then prompts that want more experts than there are slots, failing reads, and reading ahead.
"""

import errno
import functools
import json
import os
import threading
from concurrent.futures import Future

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils
from mlx_lm.models.cache import make_prompt_cache
from support import tiny_mixtures
from support.checkpoints import edit_config, edit_weights
from support.parity import PROMPT, greedy, logits
from support.platforms import fix_memory
from support.tiny import make_checkpoint
from support.tiny_mixtures import EXPERTS, TINY_MIXTURES, make_mixture

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
    ReadError,
)
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models.mixtures import ALIASES, MIXTURES, find_mixture, modules
from mlx_flash.models.registry import get_classes, make_model
from mlx_flash.paging.slots.pending_reads import PendingReads
from mlx_flash.paging.slots.row_cache import RowCache
from mlx_flash.paging.slots.slot_store import SlotStore
from mlx_flash.performance.inspection import describe
from mlx_flash.runtime.load import load, load_model
from mlx_flash.runtime.memory_plan import way_budgets
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

METAL = ("muse_spark",)  # families whose forward runs on Metal only
PAGED = sorted(set(MIXTURES) - set(METAL))
WANTED = ("deepseek_v2", "glm4_moe", "granitemoe", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe")
WANTED += ("qwen3_next",)
WHOLE = ("deepseek_v3", "gpt_oss", "mixtral", "nemotron_h")
KINDS = {
    "float32": ("float32", None),
    "4 bit": ("float32", 4),
    "8 bit": ("float32", 8),
    "bfloat16": ("bfloat16", None),
    "4 bit in bfloat16": ("bfloat16", 4),
}
MAIN = ("float32", "4 bit")
SHARES = (0.25, 0.5, 1.0)
GROUP = 32
# Families in which two layers have experts, and those whose config is for four layers or none.
TWO = ("deepseek_v41", "gemma4", "gemma4_text", "gpt_oss", "granitemoe", "granitemoehybrid")
TWO += ("hunyuan", "longcat_flash", "longcat_flash_ngram", "mellum", "minimax", "mixtral", "olmoe")
TWO += ("phimoe", "phixtral", "qwen2_moe", "qwen3_vl_moe")
AS_IT_IS = ("jamba", "kimi_linear", "llama4", "minimax_m3_vl", "nemotron_h", "qwen3_5_moe")
AS_IT_IS += ("qwen3_next",)


@pytest.fixture
def reads(monkeypatch):
    """Reads through the page cache, of no bytes but those asked for."""
    reader = functools.partial(RowReader, direct=False, threads=2, gap_bytes=0)
    monkeypatch.setattr("mlx_flash.runtime.load.RowReader", reader)


def few_layers(model_type):
    """Keys of a config with as few layers as it takes to have two with experts."""
    if model_type in AS_IT_IS:
        return {}
    layers = 2 if model_type in TWO else 3

    def shortened(config):
        new = {k: v[:layers] for k, v in config.items() if isinstance(v, list) and len(v) == 4}
        new |= {k: layers for k in ("num_hidden_layers", "num_layers") if k in config}
        if "text_config" in config:
            new["text_config"] = config["text_config"] | shortened(config["text_config"])
        return new

    return shortened(TINY_MIXTURES[model_type])


def gather_mm(a, b, lhs_indices=None, rhs_indices=None, *, sorted_indices=False, **_):
    """What mx.gather_mm computes for the switch layers, of any type."""
    assert lhs_indices is None
    return a @ b[rhs_indices]


def checkpoint(path, model_type="mixtral", kind="float32", **overrides):
    """A tiny checkpoint of a kind."""
    dtype, bits = KINDS[kind]
    source = make_mixture(path / "hf", model_type, dtype, **overrides)
    return tiny_mixtures.quantised(source, path / "quantised", bits, GROUP) if bits else source


def dense_of(source):
    return utils.load_model(source, get_model_classes=get_classes)[0]


def assert_slots_hold_their_rows(model):
    """Every cached row is, byte for byte, the row file's."""
    path = model.flash.directory.rows.path
    count = 0
    for layer, cache in model.flash.caches.items():
        for reads in cache.reads.early.values():
            model.flash.reader.wait(reads)
        extent = model.flash.directory.rows.layers[layer]
        rows = np.fromfile(path, np.uint8, extent.nbytes, offset=extent.offset)
        rows = rows.reshape(extent.rows, extent.layout.stride)
        for slot, row in enumerate(cache.slots.rows()):
            for part, view in zip(extent.layout.parts, cache.slots.memory.views, strict=True):
                expected = rows[row, part.offset : part.offset + part.nbytes]
                assert np.array_equal(view[slot, : part.nbytes], expected), (layer, row, part.name)
            count += 1
    return count


# Every family


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", PAGED)
def test_same_as_dense(tmp_path, reads, monkeypatch, request, family, kind):
    whole = family in WHOLE or request.config.getoption("--whole")
    if kind not in MAIN and not whole and family not in WANTED:
        pytest.skip("make test-whole runs every family in every type")
    if kind == "bfloat16":
        monkeypatch.setattr(mx, "gather_mm", gather_mm)
        monkeypatch.setattr(
            "mlx_flash.runtime.pagers.back_end.check_back_end", lambda directory: None
        )
    source = checkpoint(tmp_path, family, kind, **few_layers(family))
    directory = ModelDirectory(convert(str(source), tmp_path / "flash"))
    assert directory.unit == "expert"
    dense = dense_of(source)
    count = 128 if whole else 96 if kind in MAIN else 8
    tokens, expected = greedy(dense, count), logits(dense)
    assert len(set(tokens)) > 1
    shares = SHARES if kind in MAIN or whole else (0.25,)
    for share in shares:
        model = load_model(directory, PagingOptions(cache_share=share))
        slots = {layer: round(share * EXPERTS) for layer in range(len(directory.rows.layers))}
        assert model.flash.plan.slots == (slots if share < 1 else {})
        assert mx.array_equal(logits(model), expected), f"logits at share {share}"
        if whole or share == 0.25:
            assert greedy(model, count) == tokens, f"tokens at share {share}"
        model.flash.close()


def test_every_family_has_two_layers_of_experts():
    """What few_layers leaves is more than one layer, else layers could not be mixed up."""
    for family in PAGED:
        config = tiny_mixtures.config(family, **few_layers(family))
        assert len(modules(make_model(config), find_mixture(config))) >= 2, family


# More experts than slots


LONG = [(7 * i) % 250 + 3 for i in range(80)]


@pytest.fixture(scope="module", params=["float32", "4 bit"])
def made(request, tmp_path_factory):
    """(directory, dense model) of a tiny Mixtral."""
    path = tmp_path_factory.mktemp("mixtral")
    source = checkpoint(path, "mixtral", request.param, num_hidden_layers=3)
    return ModelDirectory(convert(str(source), path / "flash")), dense_of(source)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.75])
def test_long_prompt_reads_every_expert_once(made, reads, share):
    """More experts than slots: they pass in rounds, each read once a layer, then some are kept."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=share))
    layers = directory.rows.layers
    cache = make_prompt_cache(model)
    found = model(mx.array([LONG]), cache=cache)
    mx.eval(found)
    stats = model.flash.stats()
    asked = EXPERTS * len(layers)
    assert stats.predicted == stats.misses == asked, "a prompt that does not want all experts"
    assert stats.hits == 0
    assert stats.bytes_read == sum(directory.rows.layer_bytes(i) for i in range(len(layers)))
    assert mx.array_equal(found, dense(mx.array([LONG]), cache=make_prompt_cache(dense)))
    slots = model.flash.plan.slots[0]
    assert assert_slots_hold_their_rows(model) == slots * len(layers)

    model(mx.array([LONG]), cache=make_prompt_cache(model))
    again = model.flash.stats() - stats
    assert (again.hits, again.misses) == (slots * len(layers), asked - slots * len(layers))
    assert again.bytes_read == again.misses * layers[0].layout.stride
    assert greedy(model, 32, prompt=LONG) == greedy(dense, 32, prompt=LONG)
    model.flash.close()


def test_fewer_slots_than_experts_of_a_token(made, reads):
    """One slot, two experts a token."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.01))
    assert set(model.flash.plan.slots.values()) == {1}
    assert greedy(model) == greedy(dense)
    stats = model.flash.stats()
    assert stats.hits > 0
    assert stats.hits + stats.misses == stats.predicted
    assert assert_slots_hold_their_rows(model) == len(directory.rows.layers)
    model.flash.close()


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_batch(made, reads, share):
    """Three sequences at once, a prompt and then steps."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=share))
    prompts = mx.array([PROMPT, PROMPT[::-1], [t + 1 for t in PROMPT]])
    caches = make_prompt_cache(model), make_prompt_cache(dense)
    x = prompts
    for _ in range(4):
        found, expected = model(x, cache=caches[0]), dense(x, cache=caches[1])
        assert mx.array_equal(found, expected)
        x = mx.argmax(expected[:, -1:], axis=-1)
    model.flash.close()


def test_one_generation_after_the_other(made, reads):
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.25))
    for prompt in (PROMPT, LONG, PROMPT[:1], PROMPT):
        assert greedy(model, 40, prompt=prompt) == greedy(dense, 40, prompt=prompt)
    assert_slots_hold_their_rows(model)
    model.flash.close()


@pytest.mark.parametrize(
    ("policy", "lookahead"),
    [("window", False), ("lru", False), ("lru", True), ("lfu", False), ("lfu", True)],
)
def test_hits_and_misses_are_what_was_asked_for(made, reads, policy, lookahead):
    directory, dense = made
    model = load_model(
        directory, PagingOptions(cache_share=0.5, policy=policy, lookahead=lookahead)
    )
    assert greedy(model, 40) == greedy(dense, 40)
    stats = model.flash.stats()
    assert stats.hits > 0
    assert stats.misses > 0
    assert stats.hits + stats.misses == stats.predicted
    assert stats.layer_calls == stats.forwards * len(directory.rows.layers)
    stride = directory.rows.layout.stride
    if not stats.foretold:
        assert stats.bytes_read == stats.misses * stride
    assert_slots_hold_their_rows(model)
    model.flash.close()


# Failing reads


class Failing:
    """os.preadv that fails once, at a call of so high a number."""

    def __init__(self):
        self.calls, self.failing, self.real = 0, 0, os.preadv

    def __call__(self, fd, buffers, offset):
        self.calls += 1
        if self.calls == self.failing:
            raise OSError(errno.EIO, "Input/output error")
        return self.real(fd, buffers, offset)

    def at(self, call):
        self.calls, self.failing = 0, call


@pytest.mark.parametrize("prompt", [PROMPT, LONG], ids=["slots", "rounds"])
def test_a_failing_read(made, reads, monkeypatch, prompt):
    """ReadError, wherever it strikes; what is called after it is right again."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.25))
    expected = greedy(dense, 12, prompt=prompt)
    monkeypatch.setattr(os, "preadv", failing := Failing())
    for call in (1, 7, 16):
        failing.at(call)
        with pytest.raises(ReadError, match=r"layer \d+, row \d+"):
            greedy(model, 12, prompt=prompt)
        assert greedy(model, 12, prompt=prompt) == expected
        assert_slots_hold_their_rows(model)
    model.flash.close()


def test_a_failing_read_that_was_prefetched(made, reads, monkeypatch):
    """It is told when its row is needed; of a row that is not, nobody needs to know."""
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=0.5, lookahead=True))
    expected = greedy(dense, 12)
    monkeypatch.setattr(os, "preadv", failing := Failing())
    told = 0
    for call in range(1, 30, 4):
        failing.at(call)
        for _ in range(2):
            try:
                assert greedy(model, 12) == expected
            except ReadError:
                told += 1
        failing.at(0)
        assert greedy(model, 12) == expected
        assert_slots_hold_their_rows(model)
    assert told
    model.flash.close()


# Prefetching


def test_lookahead(made, reads, monkeypatch):
    """The same tokens; what was prefetched and needed counts as useful, and as a hit."""
    directory, dense = made
    layers, gates, prefetch = set(), {}, RowCache.prefetch

    def recorded(cache, rows, gate):
        layers.add(cache.layer)
        gates[cache.layer] = gate
        prefetch(cache, rows, gate)

    monkeypatch.setattr(RowCache, "prefetch", recorded)
    model = load_model(directory, PagingOptions(cache_share=0.5, lookahead=True))
    assert greedy(model) == greedy(dense)
    stats = model.flash.stats()
    assert 0 < stats.useful <= stats.foretold
    assert stats.hits + stats.misses == stats.predicted
    stride = directory.rows.layout.stride
    assert stats.misses * stride < stats.bytes_read <= (stats.misses + stats.foretold) * stride
    assert assert_slots_hold_their_rows(model) == 4 * len(directory.rows.layers)
    assert layers == set(range(1, len(directory.rows.layers))), "nothing is before the first layer"
    right = sum(gate.right for gate in gates.values())
    assert stats.useful <= right <= sum(gate.predicted for gate in gates.values())
    assert all(gate.is_open and gate.steps for gate in gates.values())

    without = load_model(directory, PagingOptions(cache_share=0.5, lookahead=False))
    greedy(without)
    counted = without.flash.stats()
    assert (counted.foretold, counted.useful) == (0, 0)
    for loaded in (model, without):
        loaded.flash.close()


class Held:
    """In the place of the pool of reads behind: each waits for a word before it goes on.

    Args:
        begun: whether reads are under way while they wait; others can be cancelled.
    """

    def __init__(self, begun):
        self.begun, self.word = begun, threading.Event()
        self.asked = self.ran = self.cancelled = 0

    def submit(self, function, *args):
        future = Future()
        self.asked += 1
        if self.begun:
            future.set_running_or_notify_cancel()
        threading.Thread(target=self._run, args=(future, function, args), daemon=True).start()
        return future

    def _run(self, future, function, args):
        self.word.wait()
        if not self.begun and not future.set_running_or_notify_cancel():
            self.cancelled += 1
            return
        try:
            function(*args)
        except BaseException as error:
            future.set_exception(error)
        else:
            self.ran += 1
            future.set_result(None)

    def shutdown(self, wait):
        self.word.set()


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.375, 0.5])
def test_prefetched_reads_that_are_late(made, reads, monkeypatch, share, begun):
    """A prefetch is not done when its row is needed, or when its row has left its slot.

    Reads behind are held until somebody waits for them: those that have not begun are asked for
    anew, those under way are waited for before their slot is used for anything else.
    """
    directory, dense = made
    model = load_model(directory, PagingOptions(cache_share=share, lookahead=True))
    reader = model.flash.reader
    reader._behind.shutdown()
    held = reader._behind = Held(begun)
    late = {"needed": 0, "left": 0}
    real_drop, real_wait = reader.drop, reader.wait

    def let_go(futures, why):
        if begun and any(not future.done() for future in futures):
            late[why] += 1
            held.word.set()

    def drop(futures):
        if not begun:
            late["left"] += len(futures)
        let_go(futures, "left")
        real_drop(futures)
        held.word.clear()

    def wait(futures):
        let_go(futures, "needed")
        real_wait(futures)
        held.word.clear()

    monkeypatch.setattr(reader, "drop", drop)
    monkeypatch.setattr(reader, "wait", wait)
    assert greedy(model, 64) == greedy(dense, 64)
    stats = model.flash.stats()
    assert stats.foretold > 0
    assert stats.useful > 0
    assert stats.hits + stats.misses == stats.predicted
    assert held.asked == stats.foretold
    if begun:
        assert late["needed"]
    assert late["left"], "no prefetched row has left before it was read"
    held.word.set()
    assert assert_slots_hold_their_rows(model)
    model.flash.close()


# What is no mixture, or no whole one


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


STEPS = {
    RowCache: ("_enter", "_place", "prefetch"),
    SlotStore: ("enter", "move"),
    PendingReads: ("claim", "settle", "_submit", "_wait"),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
@pytest.mark.parametrize("owner, step", [(o, step) for o in STEPS for step in STEPS[o]])
def test_interrupted_anywhere(made, reads, monkeypatch, owner, step, before):
    """Whatever step of fetching an interrupt strikes, what comes after it is right."""
    directory, dense = made
    real, left = getattr(owner, step), [0]

    def struck(self, *args, **kwargs):
        left[0] -= 1
        if before and left[0] == 0:
            raise KeyboardInterrupt
        found = real(self, *args, **kwargs)
        if not before and left[0] == 0:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, step, struck)
    model = load_model(directory, PagingOptions(cache_share=0.5, lookahead=True))
    expected = greedy(dense, 12)
    assert greedy(model, 12) == expected
    left[0] = 3
    with pytest.raises(KeyboardInterrupt):
        greedy(model, 12, prompt=[9, 8, 7, 77, 6])
    assert greedy(model, 12) == expected
    assert_slots_hold_their_rows(model)
    model.flash.close()


def test_lookahead_where_there_is_nothing_to_look_for(tmp_path, capsys):
    dense = convert(make_checkpoint(tmp_path / "hf", "llama", "float32"), tmp_path / "dense")
    args = ["generate", "--model", str(dense), "--prompt", "x", "--lookahead"]
    assert cli.main(args) == 2
    assert "low-rank predictors and for mixtures" in capsys.readouterr().err
    assert cli.main([*args, "--policy", "window"]) == 2
    assert "--policy window" in capsys.readouterr().err
