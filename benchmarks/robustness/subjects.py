"""What is mutated: tiny models, each with the files that may be changed and what is then done."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from gguf import GGUFWriter
from mlx_lm import generate

from benchmarks.support.from_tests import from_tests
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory import expert_demand_file
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.performance.inspection import describe, remarks, report
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors
from mlx_flash.runtime.load import load
from mlx_flash.runtime.options import PagingOptions

from .mutators import mutate

LAYERS = 2
PERPLEXITY = {"perplexity_dense": 10.0, "perplexity_predicted": 10.5}
MEASURED = {"text": "random", "tokens": 1000, "gain": 0.1}


@dataclass(frozen=True)
class Subject:
    """One model and what may be wrong with it.

    Args:
        path: its folder, or file.
        files: that are changed, by pattern; a pattern that stands twice is taken twice as often.
        use: what is done with the changed copy.
    """

    path: Path
    files: tuple[str, ...]
    use: Callable[[Path], None]


def run_checkpoint(path: Path) -> None:
    """Convert, and use what comes out."""
    run_directory(convert(path, path.with_name("out")))


def run_gguf(path: Path) -> None:
    """The same for the file in a folder."""
    run_directory(convert(next(path.glob("*.gguf")), path.with_name("out")))


def run_directory(path: Path) -> None:
    """Open, describe, hash, load with half of its layers paged, generate two tokens."""
    directory = ModelDirectory(path)
    report(describe(directory, PagingOptions(context=64)))
    remarks(path)
    list(directory.verify())
    for module in (predictor_file, expert_demand_file):
        if (path / module.NAME).exists():
            module.verify(path / module.NAME)
    half = None if (path / predictor_file.NAME).exists() else 0.5
    kept = {"cache_share": 0.5} if directory.mixture or half is None else {"kept_share": half}
    model, tokenizer = load(path, **kept)
    try:
        generate(model, tokenizer, "the", max_tokens=2)
    finally:
        model.flash.close()


def make_subjects(base: Path) -> dict[str, Subject]:
    """All subjects, made in an empty folder."""
    make = from_tests("tiny").make_checkpoint
    relu = make(base / "relu", "llama", "bfloat16", layers=LAYERS, hidden_act="relu")
    shards = make(base / "shards", "qwen2", "float32", layers=LAYERS, shards=3)
    mixture = from_tests("tiny_mixtures").make_mixture(base / "mixture", "mixtral", "float32")
    directory = convert(relu, base / "directory")
    _write_predictors(directory)
    experts = convert(mixture, base / "experts")
    _write_experts(experts)
    quantised = convert(shards, base / "quantised", quantize=True, q_group_size=32)
    gguf = base / "gguf"
    gguf.mkdir()
    _write_gguf(gguf / "tiny.gguf")
    side = ("tokenizer.json", "tokenizer_config.json")
    header, config = "*.safetensors", "config.json"
    own = (config, config, "ffn_rows.safetensors", "model.safetensors", *side)
    index = "model.safetensors.index.json"
    return {
        "checkpoint": Subject(relu, (header, header, config, config, *side), run_checkpoint),
        "sharded": Subject(shards, (index, index, header, config), run_checkpoint),
        "mixture": Subject(mixture, (header, config), run_checkpoint),
        "directory": Subject(directory, own, run_directory),
        "predictors": Subject(directory, (predictor_file.NAME,), run_directory),
        "experts": Subject(experts, (expert_demand_file.NAME, config), run_directory),
        "quantised": Subject(quantised, own, run_directory),
        "gguf": Subject(gguf, ("tiny.gguf",), run_gguf),
    }


def changed_copy(subject: Subject, folder: Path, rng: random.Random) -> str:
    """A copy of a subject with one file changed, in ``folder/model``; returns the file's name.

    Files are linked, not copied: only the one that changes is written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    for file in subject.path.iterdir():
        os.link(file, folder / "model" / file.name)
    found = sorted((folder / "model").glob(rng.choice(subject.files)))
    target = rng.choice(found)
    mutate(target, rng)
    return target.name


def _write_predictors(path: Path) -> None:
    """Random low-rank predictors."""
    directory = ModelDirectory(path)
    rows, d_model, rank = directory.rows.layers[0].rows, directory.d_model, 4
    layers = [
        LayerPredictor(
            "low-rank",
            tensors={
                "first": mx.random.normal((rank, d_model)).astype(mx.bfloat16),
                "second": mx.random.normal((rows, rank)).astype(mx.bfloat16),
                "bias": mx.zeros((rows,), mx.bfloat16),
            },
            demand={"4": rows / 3},
        )
        for _ in range(LAYERS)
    ]
    found = Predictors("low-rank", directory.rows.fingerprint, layers, PERPLEXITY)
    predictor_file.write(path / predictor_file.NAME, found)


def _write_experts(path: Path) -> None:
    directory = ModelDirectory(path)
    curves = tuple(
        tuple(float(layer.rows - n) for n in range(layer.rows + 1))
        for layer in directory.rows.layers
    )
    found = expert_demand_file.ExpertDemand(directory.rows.fingerprint, True, curves, MEASURED)
    expert_demand_file.write(path / expert_demand_file.NAME, found)


def _write_gguf(path: Path) -> None:
    """A llama of two layers in F32 with a byte-level tokenizer."""
    tokenizer = path.with_name("tokenizer-files")
    tokenizer.mkdir()
    vocab, hidden, wide, heads = 300, 64, 96, 4
    from_tests("tiny").write_tokenizer(tokenizer, vocab)
    said = json.loads((tokenizer / "tokenizer.json").read_text())
    shutil.rmtree(tokenizer)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = sorted(said["model"]["vocab"], key=said["model"]["vocab"].get)
    special = {one["content"] for one in said["added_tokens"]}
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in said["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("</s>"))
    random_ = np.random.default_rng(0)
    shapes = {"token_embd": (vocab, hidden), "output": (vocab, hidden), "output_norm": (hidden,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (hidden, hidden) for name in _ATTENTION}
        shapes |= {f"blk.{i}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{i}.{name}": (wide, hidden) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (hidden, wide)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", 0.1 * random_.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
