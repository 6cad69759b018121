"""A random llama of TinyLlama-1.1B's shape whose FFNs are sparse by construction, and its twin.

Real: the shapes, float16, the activation, attention, which words of a novel follow each other. Made
up: the weights. About a tenth of the neurons fire for a token, some far more often than others (a
log-normal distribution). Llamas have no biases, so every embedding has one direction in common,
which RMSNorm keeps, and every gate row leans against it as far as its neuron's rate calls for.
Gates have rank 128, so a low-rank predictor exists that knows what they say to the last bit or so;
its threshold is lowered until it names 1.3 times the rows that fire.

Greedy decoding from ``flash_prompt`` (token numbers, in config.json) repeats the novel: each place
has a token of its own, embedded near its word, and the head's row of the following token is what
attention and FFNs have made of the hidden state there. So no token repeats, margins are wide (all
float types give the same text), and a program that leaves the FFN out loses the thread.

Two checkpoints come out: ``relu`` and ``silu``, with the same layers (hard links) and another head.
Programs that compute SwiGLU whatever the config says (mlx-lm, llama.cpp, nunspark) are given the
second one. All matrices have the same sizes, and a dense program's time does not depend on the
activation, so speeds may be compared across the two.

    python -m benchmarks.support.synthetic_llama                      # 2.2 GB
    python -m benchmarks.support.synthetic_llama --out OUT --small    # 0.1 GB

Knows: how checkpoints, model directories and GGUF files are made. Does not know: who runs them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np

from benchmarks.support.firing import frequencies, low_rank, normal_quantiles, novel
from benchmarks.support.from_tests import write_tokenizer
from benchmarks.support.machine import OUT
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors

PROMPT, LENGTH = 16, 320  # tokens; prompt and continuation together
FIRST_ID = 600  # tokens before that are letters, marks and merges
SPREAD = 2.0  # standard deviation of log(how often a neuron fires)
COMMON = 1.0  # size of the direction that all embeddings share, against the rest
ATTENTION_SCALE, FFN_SCALE = 0.4, 0.25  # what a block adds, against an embedding of 1
VARIANTS = ("relu", "silu")


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are TinyLlama-1.1B's."""

    hidden: int = 2048
    rows: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    vocab: int = 32000
    rank: int = 128
    active: float = 0.10  # of the rows, on average
    predicted: float = 0.13


SMALL = Shape(512, 1408, 8, 8, 2, 32000, 64)


def norm(x: np.ndarray) -> np.ndarray:
    """RMSNorm without weights."""
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-5)


def rope(x: np.ndarray) -> np.ndarray:
    """Of [heads, tokens, size], halves turned against each other as llama does."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
    sin, cos = np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attend(x: np.ndarray, weights: dict[str, np.ndarray], shape: Shape) -> np.ndarray:
    """Causal attention over the text, [tokens, hidden]."""

    def split(name: str) -> np.ndarray:
        y = (x @ weights[name].T).reshape(len(x), -1, shape.hidden // shape.heads).swapaxes(0, 1)
        return np.repeat(y, shape.heads // y.shape[0], axis=0)

    q, k, v = rope(split("q")), rope(split("k")), split("v")
    scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(q.shape[-1]))
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ v
    return mixed.swapaxes(0, 1).reshape(len(x), -1) @ weights["o"].T


def activate(name: str, x: np.ndarray) -> np.ndarray:
    """ReLU or SiLU."""
    return np.maximum(x, 0) if name == "relu" else x / (1 + np.exp(-x))


class Maker:
    """Makes layer after layer while the text passes through them, once for each activation."""

    def __init__(self, out: Path, shape: Shape, seed: int) -> None:
        self.out, self.shape = out, shape
        self.random = np.random.default_rng(seed)
        self.predictors: list[LayerPredictor] = []
        self.where: dict[str, str] = {}
        self.figures: list[dict[str, float]] = []
        u = self.random.standard_normal(shape.hidden).astype(np.float32)
        self.common = u / np.linalg.norm(u)
        self.tokens = FIRST_ID + self.random.permutation(shape.vocab - FIRST_ID)[: LENGTH + 1]

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32) * np.float32(scale)

    def beside(self, weight: np.ndarray) -> np.ndarray:
        """A weight whose output, [out, in], has nothing of the common direction."""
        return weight - np.outer(self.common, self.common @ weight)

    def save(self, name: str, tensors: dict[str, np.ndarray], variant: str) -> None:
        arrays = {key: mx.array(value.astype(np.float16)) for key, value in tensors.items()}
        mx.save_safetensors(str(self.out / variant / name), arrays, {"format": "pt"})
        self.where |= dict.fromkeys(tensors, name)

    def shared(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        self.save(name, tensors, VARIANTS[0])
        for other in VARIANTS[1:]:
            os.link(self.out / VARIANTS[0] / name, self.out / other / name)

    def embeddings(self) -> np.ndarray:
        """Writes them; returns the text's hidden states."""
        shape = self.shape
        table = self.normal(shape.vocab, shape.hidden)
        found = novel()[: LENGTH + 1]
        of_word = {word: self.normal(shape.hidden) for word in dict.fromkeys(found)}
        for token, word in zip(self.tokens, found, strict=True):
            table[token] = 0.95 * of_word[word] + 0.3 * table[token]
        table -= np.outer(table @ self.common, self.common)
        table += COMMON * np.sqrt(shape.hidden) * self.common
        self.shared("model-embedding.safetensors", {"model.embed_tokens.weight": table})
        return table[self.tokens[:LENGTH]]

    def layer(self, index: int, states: dict[str, np.ndarray]) -> None:
        """Writes a layer and passes the hidden states of each variant through it."""
        shape, d = self.shape, self.shape.hidden
        kv = d // shape.heads * shape.kv_heads
        attention = {n: self.normal(d if n == "q" else kv, d, scale=d**-0.5) for n in "qkv"}
        attention["o"] = self.beside(self.normal(d, d, scale=ATTENTION_SCALE * d**-0.5))
        for name in VARIANTS:
            states[name] = states[name] + attend(norm(states[name]), attention, shape)
        seen = norm(states["relu"])
        first = self.normal(shape.rank, d, scale=d**-0.5)
        first -= np.outer(first @ self.common, self.common)
        first[-1] = self.common
        second = self.normal(shape.rows, shape.rank, scale=shape.rank**-0.5)
        second[:, -1] = 0
        lean = (seen @ self.common).mean()
        inputs = (seen @ first.T) @ second.T
        often = frequencies(self.random, shape.rows, shape.active, SPREAD)
        wanted = -(inputs.mean(axis=0) + inputs.std(axis=0) * normal_quantiles(1 - often))
        second[:, -1] = wanted / lean
        inputs = (seen @ first.T) @ second.T
        margin = float(np.quantile(inputs, 1 - shape.predicted))
        gate = second @ first
        up = self.normal(shape.rows, d, scale=d**-0.5)
        down = self.beside(self.normal(d, shape.rows))
        out = (activate("relu", inputs) * (seen @ up.T)) @ down.T
        down *= np.float32(FFN_SCALE / max(out.std(), 1e-9))
        for name in VARIANTS:
            seen = norm(states[name])
            fires = activate(name, seen @ gate.T) * (seen @ up.T)
            states[name] = states[name] + fires @ down.T
        self._add_predictor(first, second, margin, inputs)
        ones, at = np.ones(d, np.float32), f"model.layers.{index}."
        tensors = {f"{at}self_attn.{n}_proj.weight": w for n, w in attention.items()}
        tensors |= {f"{at}{n}_layernorm.weight": ones for n in ("input", "post_attention")}
        for name, weight in (("gate", gate), ("up", up), ("down", down)):
            tensors[f"{at}mlp.{name}_proj.weight"] = weight
        self.shared(f"model-layer-{index:02d}.safetensors", tensors)

    def _add_predictor(
        self, first: np.ndarray, second: np.ndarray, margin: float, inputs: np.ndarray
    ) -> None:
        tensors = {"first": mx.array(first), "second": mx.array(second)}
        tensors = {name: tensor.astype(mx.bfloat16) for name, tensor in tensors.items()}
        named = inputs >= margin
        self.predictors.append(low_rank(tensors, named, margin))
        fires = inputs > 0
        self.figures.append({"active": float(fires.mean()), "predicted": float(named.mean())})

    def head(self, variant: str, start: np.ndarray, end: np.ndarray) -> float:
        """Writes a head that continues the text; returns the least margin, in logits."""
        # Ridge regression: every place's own token, and nothing for the embeddings by themselves.
        seen = np.concatenate([norm(end), norm(start)])
        seen -= np.outer(seen @ self.common, self.common)
        wanted = np.eye(2 * LENGTH, LENGTH, dtype=np.float32)
        square = seen.T @ seen
        square[np.diag_indices_from(square)] += 0.01 * np.trace(square) / len(square)
        made = np.linalg.solve(square, seen.T @ wanted).T
        made *= np.sqrt(self.shape.hidden) / np.linalg.norm(made, axis=1, keepdims=True)
        table = self.normal(self.shape.vocab, self.shape.hidden, scale=0.3)
        table[self.tokens[1:]] = made
        table *= np.float32(self.shape.hidden**-0.5)
        tensors = {"lm_head.weight": table, "model.norm.weight": np.ones(self.shape.hidden)}
        self.save("model-head.safetensors", tensors, variant)
        logits = norm(end) @ table.T.astype(np.float32)
        right = logits[np.arange(LENGTH), self.tokens[1:]].copy()
        logits[np.arange(LENGTH), self.tokens[1:]] = -np.inf
        margins = right - logits.max(axis=1)
        without = (norm(start) @ table.T).argmax(axis=1) == self.tokens[1:]
        print(
            f"{variant}: margins of the text's logits {margins.min():.2f} to {margins.max():.2f}; "
            f"the embedding alone would give {int(without.sum())} of {LENGTH} tokens"
        )
        return float(margins.min())


def write_checkpoints(out: Path, shape: Shape, seed: int = 0) -> Maker:
    """``out``/relu and ``out``/silu, Hugging Face checkpoints, one file a layer."""
    for variant in VARIANTS:
        (out / variant).mkdir(parents=True)
    maker = Maker(out, shape, seed)
    start = maker.embeddings()
    states = dict.fromkeys(VARIANTS, start)
    began = time.perf_counter()
    for layer in range(shape.layers):
        maker.layer(layer, states)
    active = np.mean([figures["active"] for figures in maker.figures])
    predicted = np.mean([figures["predicted"] for figures in maker.figures])
    print(
        f"{shape.layers} layers: {active:.3f} of the rows fire, {predicted:.3f} are predicted; "
        f"{time.perf_counter() - began:.0f} s"
    )
    for variant in VARIANTS:
        maker.head(variant, start, states[variant])
        path = out / variant
        index = {"metadata": {}, "weight_map": maker.where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        write_tokenizer(path, shape.vocab)
        config = {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"],
            "hidden_size": shape.hidden, "intermediate_size": shape.rows,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "rms_norm_eps": 1e-5,
            "vocab_size": shape.vocab, "max_position_embeddings": 2048, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "hidden_act": variant, "torch_dtype": "float16",
            "flash_prompt": maker.tokens[:PROMPT].tolist(),
            "flash_text": maker.tokens[PROMPT:].tolist(),
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))
    return maker


def make(out: Path, shape: Shape) -> Path:
    """Checkpoints, model directories in bfloat16 and the GGUF file; what is there is kept.

    ``out``/relu, ``silu``: Hugging Face; ``relu-rows``, ``silu-rows``: model directories, the first
    with low-rank predictors; ``silu.gguf``: float16.
    """
    if (out / "done").exists():
        return out
    maker = write_checkpoints(out, shape)
    for variant in VARIANTS:
        # MLX's CPU back end computes bfloat16 twice as fast as float16.
        convert(str(out / variant), out / f"{variant}-rows", dtype="bfloat16")
    directory = ModelDirectory(out / "relu-rows")
    measured = {"made": "benchmarks/support/synthetic_llama.py", "layers": maker.figures}
    predictor_file.write(
        directory.path / predictor_file.NAME,
        Predictors("low-rank", directory.rows.fingerprint, maker.predictors, measured),
    )
    write_gguf(out / "silu", out / "silu.gguf")
    (out / "done").touch()
    return out


def write_gguf(source: Path, target: Path) -> None:
    """The llama checkpoint as llama.cpp reads it: float16, its rows of q and k in pairs."""
    config = json.loads((source / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(target), "llama", use_temp_file=True)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tokens = [f"<{n}>" for n in range(config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    files = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    for file in sorted(set(files.values())):
        for name, array in mx.load(str(source / file)).items():
            data = np.array(array)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                count = heads if ".q_proj" in name else kv_heads
                pairs = data.reshape(count, 2, -1, data.shape[-1]).swapaxes(1, 2)
                data = np.ascontiguousarray(pairs.reshape(data.shape))
            if data.ndim == 1:
                data = data.astype(np.float32)
            writer.add_tensor(names.get_name(name, (".weight",)), data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT / "llama-1.1b")
    parser.add_argument("--small", action="store_true", help="a model of 0.1 GB")
    options = parser.parse_args()
    make(options.out, SMALL if options.small else Shape())


if __name__ == "__main__":
    main()
