"""Time, peak memory and bits per parameter of exporting a llama of 1.1 billion random weights.

    python -m benchmarks.coreml.coreml_size
    python -m benchmarks.coreml.coreml_size --quant int4 --layers 2 --rounding nearest

TinyLlama's shape: 22 layers, 2048 wide, FFN 5632, 32 heads, 4 of keys, vocabulary 32000, untied.
Both functions are exported, nothing is verified. Peak memory is the resident peak of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx

from benchmarks.support import machine
from benchmarks.support.from_tests import write_tokenizer
from benchmarks.support.machine import ROOT

OUT = machine.OUT / "coreml"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "eos_token_id": 257,
    "torch_dtype": "float16",
}


def checkpoint(layers: int) -> Path:
    """A random checkpoint, a shard a layer, so that making it takes little memory."""
    path = OUT / f"llama-{layers}"
    if (path / "config.json").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    d, f, kv, vocab = 2048, 5632, 256, CONFIG["vocab_size"]
    shapes = {"q": (d, d), "k": (kv, d), "v": (kv, d), "o": (d, d)}
    files: dict[str, str] = {}

    def write(number: int, tensors: dict[str, mx.array]) -> None:
        name = f"model-{number:05d}.safetensors"
        mx.save_safetensors(str(path / name), tensors)
        files.update(dict.fromkeys(tensors, name))

    def random(*shape: int) -> mx.array:
        return (mx.random.normal(shape) * shape[-1] ** -0.5).astype(mx.float16)

    mx.random.seed(0)
    for i in range(layers):
        base = f"model.layers.{i}"
        tensors = {f"{base}.self_attn.{n}_proj.weight": random(*s) for n, s in shapes.items()}
        tensors |= {f"{base}.mlp.{n}_proj.weight": random(f, d) for n in ("gate", "up")}
        tensors[f"{base}.mlp.down_proj.weight"] = random(d, f)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}.{norm}.weight"] = mx.ones(d, mx.float16)
        write(i, tensors)
    ends = {"model.norm.weight": mx.ones(d, mx.float16)}
    ends |= {f"{n}.weight": random(vocab, d) for n in ("model.embed_tokens", "lm_head")}
    write(layers, ends)
    index = {"metadata": {}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(path, 1000)
    (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return path


def measure(model: Path, quant: str, rounding: str) -> str:
    """Export in a process of its own; seconds, peak memory and bits a parameter as a line."""
    out = OUT / f"{model.name}-{quant}"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "coreml_export", str(model), "-o", str(out)]
    command += ["--quant", quant, "--context", "512", "--no-verify", "--rounding", rounding]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"the export failed: {' '.join(command)}")
    content = json.loads((out / "manifest.json").read_text())
    packages = content["dense"]["packages"].values()
    size = sum(f.stat().st_size for p in packages for f in (out / p["file"]).rglob("*.bin"))
    parameters = content["architecture"]["parameters"]
    shutil.rmtree(out)
    peak = usage.ru_maxrss * 1024
    return (
        f"{quant:<6} {rounding:<10} {seconds:6.1f} s  peak {peak / 1e9:5.2f} GB = "
        f"{peak / size:4.2f} of the weights in the packages, "
        f"{peak / (2 * parameters):4.2f} of the fp16 weights;  "
        f"{8 * size / parameters:6.3f} bits a parameter, {len(packages)} packages"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quant", default="none,int8,int4")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounding", default="calibrated", choices=["calibrated", "nearest"])
    parser.add_argument("--make-only", action="store_true", help="only make the checkpoint")
    args = parser.parse_args()
    model = checkpoint(args.layers)
    if not args.make_only:
        for quant in args.quant.split(","):
            print(measure(model, quant, args.rounding), flush=True)


if __name__ == "__main__":
    main()
