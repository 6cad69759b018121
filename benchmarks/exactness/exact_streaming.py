"""The numbers of exact streaming: same tokens, footprint, speed, reading, overlap, conversion.

Prints a table and one JSON line. Every ratio comes from runs side by side in one process or one
after the other, interleaved. Models are made under benchmarks/out (about 25 GB for all of it).

    python -m benchmarks.exactness.exact_streaming [--only tokens,logits,...]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import mlx.core as mx
from mlx_lm import utils
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.support import fio
from benchmarks.support.cgroup import cgroup_root, cli
from benchmarks.support.converted import converted, smollm2
from benchmarks.support.machine import OUT, machine_name
from benchmarks.support.no_reads import NoReads
from benchmarks.support.random_llama import random_llama
from demos.smollm2 import smollm2_gguf
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.load import load_model, load_tokenizer
from mlx_flash.runtime.options import PagingOptions

PROMPT = "Write a short story about a lighthouse keeper and the sea."
TOKENS = 128
CONVERSION_BYTES = 19 * 10**9  # the larger checkpoint and what is made of it


def llama() -> ModelDirectory:
    """1.1 billion random weights."""
    return converted("llama-1b", lambda path: random_llama(path, 2048, 5632, 22))


def prompt_of(directory: ModelDirectory) -> list[int]:
    """The prompt's tokens in the model's chat template."""
    messages = [{"role": "user", "content": PROMPT}]
    return load_tokenizer(directory).apply_chat_template(messages, add_generation_prompt=True)


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    """The first ``tokens`` tokens of greedy decoding."""
    steps = generate_step(mx.array(prompt), model, max_tokens=tokens)
    return [token for token, _ in steps]


def plain_llama(directory: ModelDirectory, permuted: bool):
    """mlx-lm's own dense llama with the GGUF's weights as MLX itself reads them.

    ``permuted`` leaves the rows of q and k as they lie in the file, for ``rope_traditional``.
    """
    weights, _ = mx.load(str(smollm2_gguf()), return_metadata=True)
    names = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    dense = {}
    for key in [k for k in weights if k.endswith(".weight")]:
        *layer, last = key.removesuffix(".weight").split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        value, scales = weights[key], weights.get(key.replace("weight", "scales"))
        if scales is not None:
            width = 576 if last != "ffn_down" else 1536
            value = mx.dequantize(
                value, scales.astype(mx.float32),
                weights[key.replace("weight", "biases")].astype(mx.float32),
                group_size=width // scales.shape[-1], bits=value.shape[-1] * 32 // width,
            )  # fmt: skip
        if last in ("attn_q", "attn_k") and not permuted:
            value = value.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(-1, 576)
        dense[f"{prefix}{names[last]}.weight"] = value.astype(mx.float32)
    model_class, args = utils._get_classes(directory.config)
    config = {k: v for k, v in directory.config.items() if k != "flash"}
    model = model_class(args.from_dict({**config, "rope_traditional": permuted}))
    model.load_weights(list(dense.items()))
    return model


def tokens() -> dict:
    """Greedy tokens of the paged SmolLM2 against mlx-lm's dense class with the same weights."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        directory = smollm2(dtype)
        prompt = prompt_of(directory)
        expected = greedy(load_model(directory, PagingOptions(use_flash=False)), prompt, TOKENS)
        for share in (0.0, 0.3, 1.0):
            model = load_model(directory, PagingOptions(kept_share=share))
            same = sum(a == b for a, b in zip(greedy(model, prompt, TOKENS), expected, strict=True))
            found[f"{dtype}, {share:.0%} kept"] = f"{same} of {TOKENS}"
            model.flash.close()
    return found


def logits() -> dict:
    """Logits of the GGUF load against the same weights, read by MLX, in a plain mlx-lm llama."""
    directory = smollm2("float32")
    prompt = mx.array([prompt_of(directory)])
    ours = load_model(directory, PagingOptions(kept_share=0.3))
    found = ours(prompt, cache=make_prompt_cache(ours))
    return {
        label: mx.abs(found - plain_llama(directory, permuted)(prompt)).max().item()
        for label, permuted in (("max difference", False), ("q and k in the file's order", True))
    }


def footprint() -> dict:
    """Peak resident memory of ``generate --ram X``, in a cgroup of exactly X where there is one."""
    directory = smollm2("bfloat16")
    args = ["generate", "--model", str(directory.path), "--prompt", PROMPT, "--max-tokens", "64"]
    _, _, dense = cli(*args, "--dense")
    _, output, _ = cli(*args, "--ram", "1MB")
    least = int(float(output.split("least that works is ")[1].split(" MB")[0]) * 1e6)
    found = {"dense run": f"{dense / 1e6:.0f} MB"}
    if cgroup_root() is None:
        found["skipped"] = "the limit: no memory cgroup can be made here; that takes Linux and root"
    for ram in (least, (least + dense) // 2, dense):
        code, _, peak = cli(*args, "--ram", str(ram), limit=ram)
        found[f"budget {ram / 1e6:.0f} MB"] = f"{peak / 1e6:.0f} MB, exit {code}"
    return found


def resident() -> dict:
    """Tokens/s with everything resident over mlx-lm's dense class, pairs in one run."""
    directory = smollm2("bfloat16")
    prompt = prompt_of(directory)
    models = {"ours": load_model(directory, PagingOptions(kept_share=1.0))}
    models["dense"] = load_model(directory, PagingOptions(use_flash=False))
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(8):
        for name in sorted(models, reverse=bool(repeat % 2)):
            steps = generate_step(mx.array(prompt), models[name], max_tokens=24)
            next(steps)
            began = time.perf_counter()
            list(steps)
            times[name].append(time.perf_counter() - began)
    pairs = [d / o for o, d in zip(times["ours"], times["dense"], strict=True)]
    return {"ratio": statistics.median(pairs), "spread": [min(pairs), max(pairs)]}


def cycle(stream, rounds: int) -> float:
    """Seconds for each round through all layers when nothing is computed."""
    nothing = mx.zeros((1,))
    began = time.perf_counter()
    for _ in range(rounds):
        for layer in stream.layers:
            stream.acquire(layer, nothing)
            stream.done(nothing)
    return (time.perf_counter() - began) / rounds


def reader() -> dict:
    """The streaming reader with decoding's own requests against fio, same size and threads."""
    found = {}
    for directory in (llama(), smollm2("bfloat16")):
        model = load_model(directory, PagingOptions(kept_share=0.0))
        flash = model.flash
        block = min(flash.reader.max_rows(directory.rows.layout), directory.rows.layers[0].rows) * (
            directory.rows.layout.stride
        )
        total = sum(directory.rows.layer_bytes(i) for i in flash.plan.streamed)
        cycle(flash.stream, 1)
        ours, theirs = [], []
        for _ in range(9):  # short runs in turn: the disk drifts by a factor of two in a minute
            ours.append(total / cycle(flash.stream, max(1, int(3e9 / total))))
            flash.stream.close()
            theirs.append(
                fio.bytes_per_second(directory.rows.path, block, flash.reader.bulk_threads)
            )
        flash.close()
        found[directory.path.name] = {
            "request": block,
            "threads": flash.reader.bulk_threads,
            "MB/s": [round(x / 1e6) for x in ours],
            "fio MB/s": [round(x / 1e6) for x in theirs],
            "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
    return found


def seconds_per_token(model, tokens: int = 6) -> float:
    """Of greedy decoding, the prompt and the first token not counted."""
    steps = generate_step(mx.array([5, 6, 7]), model, max_tokens=tokens)
    next(steps)
    began = time.perf_counter()
    list(steps)
    return (time.perf_counter() - began) / (tokens - 1)


def overlap() -> dict:
    """Time per token over the longer of reading alone and computing alone."""
    found = {}
    for directory, share in (
        (llama(), 0.0),
        (llama(), 0.5),
        (smollm2("bfloat16"), 0.0),
    ):
        model = load_model(directory, PagingOptions(kept_share=share))
        stream = model.flash.stream
        reads, computes, both = [], [], []
        for _ in range(3):
            both.append(seconds_per_token(model))
            reads.append(cycle(stream, 4))
            stream.close()
            real, stream._reader = stream._reader, NoReads()
            computes.append(seconds_per_token(model))
            stream.close()
            stream._reader = real
        model.flash.close()
        read, compute, token = map(statistics.median, (reads, computes, both))
        found[f"{directory.path.name}, {share:.0%} kept"] = {
            "ms per token": token * 1e3, "read alone": read * 1e3, "compute alone": compute * 1e3,
            "ratio": token / max(read, compute),
        }  # fmt: skip
    return found


def conversion() -> dict:
    """Peak resident memory of converting random llamas of 0.5 and 8 GB."""
    if shutil.disk_usage(OUT).free < CONVERSION_BYTES:
        raise RuntimeError(f"it takes {CONVERSION_BYTES / 1e9:.0f} GB of disk")
    found = {}
    for name, shape in (("llama-0.5gb", (2048, 5632, 2)), ("llama-8gb", (4096, 11008, 24))):
        source = random_llama(OUT / f"{name}-hf", *shape)
        size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        shutil.rmtree(OUT / name, ignore_errors=True)
        began = time.perf_counter()
        code, output, peak = cli("convert", "--model", str(source), "--mlx-path", str(OUT / name))
        if code:
            raise RuntimeError(output)
        seconds = time.perf_counter() - began
        found[f"{size / 1e9:.2f} GB"] = f"{peak / 1e9:.2f} GB in {seconds:.0f} s"
        shutil.rmtree(OUT / name)
        shutil.rmtree(source)
    return found


def kills() -> dict:
    """SIGKILL at 20 random moments of a conversion, resumed; the files against undisturbed ones."""
    source = random_llama(OUT / "kill-hf", 1024, 2816, 6, vocab=8000)
    args = [sys.executable, "-m", "mlx_flash", "convert", "--model", str(source), "--mlx-path"]

    def files(path: Path) -> dict[str, bytes]:
        return {f.name: f.read_bytes() for f in sorted(path.iterdir())}

    out = OUT / "kill"
    shutil.rmtree(out, ignore_errors=True)
    partial = OUT / "kill.partial"

    def start() -> subprocess.Popen:
        child = subprocess.Popen(
            [*args, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while child.poll() is None and not partial.exists():
            time.sleep(0.005)
        return child

    child = start()
    began = time.perf_counter()
    child.wait()
    writing = time.perf_counter() - began
    expected = files(out)
    chance = random.Random(0)
    same = reached = tries = 0
    while reached < 20 and tries < 100:
        tries += 1
        shutil.rmtree(out)
        child = start()
        time.sleep(chance.uniform(0, 0.95 * writing))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if out.exists():
            continue  # it was done before the signal came
        reached += 1
        subprocess.run([*args, str(out)], check=True, capture_output=True)
        same += files(out) == expected and not partial.exists()
    return {"killed while writing": reached, "same files after resuming": f"{same} of {reached}"}


PARTS = (tokens, logits, footprint, resident, reader, overlap, conversion, kills)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="comma-separated: " + ",".join(p.__name__ for p in PARTS))
    wanted = parser.parse_args().only
    OUT.mkdir(exist_ok=True)
    results = {"machine": machine_name(), "date": date.today().isoformat()}
    print(f"{results['machine']}, {results['date']}")
    for part in PARTS:
        if wanted and part.__name__ not in wanted.split(","):
            continue
        print(f"\n{part.__name__}: {part.__doc__}", flush=True)
        try:
            results[part.__name__] = part()
        except RuntimeError as error:
            results[part.__name__] = {"skipped": str(error)}
        for label, value in results[part.__name__].items():
            print(f"  {label:<28} {value}", flush=True)
    print(f"\n{skipped(results)}\n{json.dumps(results)}")


def skipped(results: dict) -> str:
    """Which parts were not measured, and why, in one line."""
    reasons = {
        name: found["skipped"]
        for name, found in results.items()
        if isinstance(found, dict) and "skipped" in found
    }
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    return f"Skipped: {listed or 'nothing'}"


if __name__ == "__main__":
    main()
