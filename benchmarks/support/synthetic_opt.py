"""A random model of OPT-6.7B's shape that fires as sparsely as OPT-6.7B does.

Real: shapes, float16, activation, layer norms, attention, the words of a novel in their order as
tokens. Made up: the weights, and with them which neurons fire. ``fc1`` is a product of two random
matrices of the predictor's rank, so that a low-rank predictor exists that knows each neuron's
input to the last bit or so; its threshold is then lowered until it names about three times the
rows that fire, as trained ones do in LLM in a flash (section 3.1; 3 % fire, 10 % are predicted).
How often a neuron fires is drawn from a log-normal distribution (a few fire for most words, most
for few) and set by its bias: the model is run over the novel's beginning while it is made, layer
by layer, and each bias put where the neuron's inputs there call for it.

    python -m benchmarks.support.synthetic_opt                        # 27 GB of disk meanwhile
    python -m benchmarks.support.synthetic_opt --model OUT --small    # 0.1 GB

Knows: how the model is made. Does not know: how it is run (``staircase``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from benchmarks.support.firing import frequencies, low_rank, normal_quantiles, novel
from benchmarks.support.from_tests import write_tokenizer
from benchmarks.support.machine import OUT
from mlx_flash.conversion.convert import convert
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.predictors import predictor_file
from mlx_flash.predictors.predictor_file import LayerPredictor, Predictors

SEQUENCES, LENGTH = 6, 48  # of the novel's words, to set the biases by
ACTIVE, PREDICTED = 0.03, 0.10  # of the rows, on average
SPREAD = 2.5  # standard deviation of log(how often a neuron fires)
# Standard deviations of what attention's weights and an FFN add, against an embedding of 1: what
# they add, neighbours share, so the less it is, the more rows are fresh. Set, with ``SPREAD``, so
# that at the paper's window the share of fresh rows is near the paper's 2.4 %.
ATTENTION_SCALE, FFN_SCALE = 0.4, 0.15


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are OPT-6.7B's."""

    hidden: int = 4096
    rows: int = 16384
    layers: int = 32
    heads: int = 32
    vocab: int = 50272
    positions: int = 2048
    rank: int = 128


SMALL = Shape(1024, 4096, 8, 8, 8000, 2048, 64)


def words(vocab: int) -> np.ndarray:
    """The novel as token numbers: every word, and every mark, by a hash of its letters."""
    return np.array([zlib.crc32(word.encode()) % vocab for word in novel()], np.int32)


def norm(x: np.ndarray) -> np.ndarray:
    """Layer norm without weights."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-5)


def attend(x: np.ndarray, weights: dict[str, np.ndarray], heads: int) -> np.ndarray:
    """Causal attention over [sequences of ``LENGTH``, one behind the other; hidden]."""
    q, k, v = (
        (x @ weights[name].T).reshape(-1, LENGTH, heads, x.shape[-1] // heads).swapaxes(1, 2)
        for name in ("q", "k", "v")
    )
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ v
    return mixed.swapaxes(1, 2).reshape(x.shape) @ weights["out"].T


class Maker:
    """Makes layer after layer while the calibration words pass through them."""

    def __init__(self, path: Path, shape: Shape, seed: int) -> None:
        self.path, self.shape = path, shape
        self.random = np.random.default_rng(seed)
        self.predictors: list[LayerPredictor] = []
        self.where: dict[str, str] = {}
        self.figures: list[dict[str, float]] = []

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.random.standard_normal(shape, np.float32) * np.float32(scale)

    def save(self, name: str, tensors: dict[str, np.ndarray]) -> None:
        arrays = {key: mx.array(value.astype(np.float16)) for key, value in tensors.items()}
        mx.save_safetensors(str(self.path / name), arrays, {"format": "pt"})
        self.where |= dict.fromkeys(tensors, name)

    def embeddings(self) -> np.ndarray:
        """Writes them; returns the calibration words as hidden states."""
        shape = self.shape
        tokens = self.normal(shape.vocab, shape.hidden)
        places = self.normal(shape.positions + 2, shape.hidden, scale=0.1)
        at = "model.decoder."
        ones, zeros = np.ones(shape.hidden, np.float32), np.zeros(shape.hidden, np.float32)
        self.save(
            "model-embeddings.safetensors",
            {
                f"{at}embed_tokens.weight": tokens,
                f"{at}embed_positions.weight": places,
                f"{at}final_layer_norm.weight": ones,
                f"{at}final_layer_norm.bias": zeros,
            },
        )
        x = tokens[words(shape.vocab)[: SEQUENCES * LENGTH]]
        return x + np.tile(places[2 : LENGTH + 2], (SEQUENCES, 1))

    def layer(self, index: int, x: np.ndarray) -> np.ndarray:
        """Writes a layer; returns what it makes of the hidden states x."""
        shape, d = self.shape, self.shape.hidden
        ones, zeros = np.ones(d, np.float32), np.zeros(d, np.float32)
        attention = {n: self.normal(d, d, scale=d**-0.5) for n in ("q", "k", "v", "out")}
        attention["out"] *= np.float32(ATTENTION_SCALE)
        x = x + attend(norm(x), attention, shape.heads)
        seen = norm(x)
        first = self.normal(shape.rank, d, scale=d**-0.5)
        second = self.normal(shape.rows, shape.rank, scale=shape.rank**-0.5)
        inputs = (seen @ first.T) @ second.T
        often = frequencies(self.random, shape.rows, ACTIVE, SPREAD)
        bias = -(inputs.mean(axis=0) + inputs.std(axis=0) * normal_quantiles(1 - often))
        inputs += bias
        fires = np.maximum(inputs, 0)
        down = self.normal(d, shape.rows)
        out = fires @ down.T
        scale = np.float32(FFN_SCALE / max(out.std(), 1e-9))
        margin = np.quantile(inputs, 1 - PREDICTED)
        self._add_predictor(first, second, bias, float(margin), inputs)
        self.figures.append(
            {
                "active": float((inputs > 0).mean()),
                "predicted": float((inputs >= margin).mean()),
                "margin": float(margin),
            }
        )
        at = f"model.decoder.layers.{index}."
        tensors = {f"{at}self_attn.{n}_proj.weight": w for n, w in attention.items()}
        tensors |= {f"{at}self_attn.{n}_proj.bias": zeros for n in attention}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors |= {f"{at}{name}.weight": ones, f"{at}{name}.bias": zeros}
        tensors |= {f"{at}fc1.weight": second @ first, f"{at}fc1.bias": bias}
        tensors |= {f"{at}fc2.weight": down * scale, f"{at}fc2.bias": zeros}
        self.save(f"model-layer-{index:02d}.safetensors", tensors)
        return x + out * scale

    def _add_predictor(
        self,
        first: np.ndarray,
        second: np.ndarray,
        bias: np.ndarray,
        margin: float,
        inputs: np.ndarray,
    ) -> None:
        tensors = {
            name: mx.array(value.astype(np.float16))
            for name, value in (("first", first), ("second", second), ("bias", bias))
        }
        self.predictors.append(low_rank(tensors, inputs >= margin, margin))


def write_checkpoint(path: Path, shape: Shape, seed: int) -> Maker:
    """A Hugging Face checkpoint, one file a layer."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    maker = Maker(path, shape, seed)
    x = maker.embeddings()
    for layer in range(shape.layers):
        began = time.perf_counter()
        x = maker.layer(layer, x)
        figures = maker.figures[-1]
        print(
            f"layer {layer}: {figures['active']:.3f} of the rows fire, "
            f"{figures['predicted']:.3f} predicted at a margin of {figures['margin']:.2f}; "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    index = {"metadata": {}, "weight_map": maker.where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": shape.hidden,
        "word_embed_proj_dim": shape.hidden, "ffn_dim": shape.rows, "vocab_size": shape.vocab,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.positions, "activation_function": "relu",
        "do_layer_norm_before": True, "enable_bias": True, "torch_dtype": "float16",
        "layer_norm_elementwise_affine": True, "tie_word_embeddings": True,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path, 300)
    return maker


def make(path: Path, shape: Shape, seed: int = 0) -> ModelDirectory:
    """The model directory with its predictors; what is there already is taken as it is."""
    if (path / predictor_file.NAME).exists():
        return ModelDirectory(path)
    source = path.with_name(path.name + "-hf")
    maker = write_checkpoint(source, shape, seed)
    convert(str(source), path, force=path.exists())
    shutil.rmtree(source)
    directory = ModelDirectory(path)
    measured = {"made": asdict(shape), "layers": maker.figures, "spread": SPREAD, "seed": seed}
    predictor_file.write(
        path / predictor_file.NAME,
        Predictors("low-rank", directory.rows.fingerprint, maker.predictors, measured),
    )
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=OUT / "opt-6.7b-shape")
    parser.add_argument("--small", action="store_true", help="a model of 0.2 GB")
    options = parser.parse_args()
    make(options.model, SMALL if options.small else Shape())


if __name__ == "__main__":
    main()
