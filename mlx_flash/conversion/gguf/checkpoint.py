"""A llama GGUF file as a checkpoint: Hugging Face's names of weights, its config and tokenizer.

Of GGUF's architectures llama alone is read (dense, gated SiLU FFN, no biases), with linear, yarn
and llama-3 rope scaling; not mixtures, nor files split in shards. Whatever would be computed
differently is an error. Tensors stay quantised (``block_formats`` says how) or become floats. Q and
K come in Hugging Face's order of rows, so the result is an ordinary llama (``rope_traditional``
False). Every check is made when the object is built, before any tensor is read (but for the few
floats of ``rope_freqs``).
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from mlx_flash.common.files import digest_of
from mlx_flash.conversion.adapter import Adapter
from mlx_flash.conversion.checkpoint import CheckpointFacts
from mlx_flash.conversion.model_spec import ModelSpec
from mlx_flash.errors import ModelError
from mlx_flash.models.dtypes import FLOATS

from . import tokenizer
from .block_formats import SourceScheme, source_scheme
from .header import Tensor, check_extents, check_file, check_types, naming, read_header, some
from .tensors import affine_shapes, read_affine, read_floats, read_rows

# GGUF name -> Hugging Face name and shape: h hidden, q queries, k keys, f FFN, v vocabulary.
_GLOBAL = {
    "token_embd": ("model.embed_tokens", "vh"),
    "output_norm": ("model.norm", "h"),
    "output": ("lm_head", "vh"),
}
_LAYER = {
    "attn_norm": ("input_layernorm", "h"),
    "attn_q": ("self_attn.q_proj", "qh"),
    "attn_k": ("self_attn.k_proj", "kh"),
    "attn_v": ("self_attn.v_proj", "kh"),
    "attn_output": ("self_attn.o_proj", "hq"),
    "ffn_norm": ("post_attention_layernorm", "h"),
    "ffn_gate": ("mlp.gate_proj", "fh"),
    "ffn_up": ("mlp.up_proj", "fh"),
    "ffn_down": ("mlp.down_proj", "hf"),
}
# Keys that change what a llama computes, unless they say 0 or False (unset) or 1 (a factor).
_CHANGES = """attention.clamp_kqv attention.max_alibi_bias attention.scale attention.sliding_window
attention.temperature_scale attn_logit_softcapping final_logit_softcapping embedding_scale
logit_scale residual_scale rope.scaling.attn_factor rope.scaling.yarn_attn_factor
rope.scaling.yarn_ext_factor rope.scaling.yarn_log_multiplier"""


class GGUFCheckpoint:
    """One GGUF file under the names of a Hugging Face llama; see ``checkpoint.Checkpoint``.

    A quantised matrix X is three tensors, as mlx-lm names them: ``X.weight`` (packed codes),
    ``X.scales`` and ``X.biases``; ``config["quantization"]`` says how they are packed.

    Args:
        path: the file.
        dtype: "float16", "bfloat16" or "float32" for all floats, scales and biases among them.
            Default: float16 if any matrix stays quantised, as the file has its scales; bfloat16
            if any tensor is quantised and made floats, or is bfloat16; else float16 if any is,
            else float32. bfloat16 rounds scales and biases (relative error up to 2^-8); float32
            holds the scales of every type whose codes are kept. On a CPU, MLX 0.32 multiplies
            quantised matrices with sums in that type: float32 is the fast and the accurate one.
        dequantize: make floats of all tensors.
        adapter: what changes the model; all tensors are made floats for it.

    Raises:
        ModelError: the file is of a kind that is not read, or contradicts itself.
        DamagedError: it is cut off, or its header cannot be parsed.
    """

    def __init__(
        self,
        path: Path,
        dtype: str | None = None,
        dequantize: bool = False,
        adapter: Adapter | None = None,
    ) -> None:
        if dtype is not None and dtype not in FLOATS:
            raise ModelError(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
        self.path = Path(path)
        self._adapter = adapter
        with naming(self.path):
            stat = check_file(self.path)
            self._meta, infos = read_header(self.path, stat.st_size)
            dims = _dimensions(self._meta)
            check_types(infos)
            tokenizer.check(self._meta)
            by_name = {t.name: t for t in infos}
            dims["v"] = _vocab_size(self._meta, by_name)
            tied = "output.weight" not in by_name
            names = _check_tensors(by_name, dims, tied)
            check_extents(infos, stat.st_size)
            self._head_dim = dims["head_dim"]
            self._tensors = {name: by_name[source] for source, name in names.items()}
            floats = dequantize or adapter is not None
            self._schemes = {} if floats else _schemes(self._tensors)
            dtype = dtype or _default_dtype(infos, bool(self._schemes))
            self._dtype = FLOATS[dtype]
            self.config: dict[str, Any] = _config(self._meta, dims, dtype, tied)
            freqs = by_name.get("rope_freqs.weight")
            factors = None if freqs is None else _read_vector(self.path, freqs)
            if scaling := _rope_scaling(self._meta, self.config, factors):
                self.config["rope_scaling"] = scaling
        if self._schemes:
            self.config["quantization"] = _quantisation(self._schemes)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, mx.Dtype] = {}
        for name, tensor in self._tensors.items():
            self._list(name.removesuffix(".weight"), tensor)
        what = [self.path.name, stat.st_size, stat.st_mtime_ns, self._meta, infos]
        self.fingerprint = digest_of(what)
        if adapter:
            self._adapt(adapter)
        self.facts = CheckpointFacts(requantised=_requantised(self._tensors, self._schemes))
        self._taken: tuple[str, dict[str, mx.array]] = ("", {})

    @cached_property
    def spec(self) -> ModelSpec:
        """Where the model's FFNs are."""
        return ModelSpec.of(self.config, self.path)

    def _list(self, path: str, tensor: Tensor) -> None:
        scheme = self._schemes.get(path)
        shapes = affine_shapes(tensor, scheme) if scheme else {"weight": tensor.shape}
        for part, shape in shapes.items():
            packed = scheme is not None and part == "weight"
            self.shapes[f"{path}.{part}"] = shape
            self.dtypes[f"{path}.{part}"] = mx.uint32 if packed else self._dtype

    def _adapt(self, adapter: Adapter) -> None:
        self.config = adapter.adapted_config(self.config)
        adapter.check_names(self.shapes)
        self.shapes |= adapter.added
        self.dtypes |= dict.fromkeys(adapter.added, self._dtype)
        self.fingerprint += adapter.sha256[:16]

    def take(self, name: str) -> mx.array:
        """The evaluated tensor; reads the bytes of that tensor and no others.

        The three parts of a quantised matrix lie together in the file: the parts not asked for are
        kept until they are taken or the next tensor is. Taken one after another, they are read
        once.

        Raises:
            ModelError: there is no such tensor, or a float type cannot hold its numbers.
            DamagedError, ReadError: it cannot be read.
        """
        if name not in self.shapes:
            raise ModelError(f"{self.path}: no tensor {name!r} among its {len(self.shapes)}")
        if self._adapter is None:
            return self._read(name)
        base = None if name in self._adapter.added else self._read(name)
        adapted = self._adapter.adapt(name, base, self._dtype)
        mx.eval(adapted)
        return adapted

    def _read(self, name: str) -> mx.array:
        path, _, part = name.rpartition(".")
        tensor = self._tensors[f"{path}.weight"]
        head_dim = self._head_dim if path.endswith(("q_proj", "k_proj")) else 0
        held, parts = self._taken
        if path != held or part not in parts:
            self._taken = ("", {})
            del parts  # freed before the next are made
            with naming(self.path):
                scheme = self._schemes.get(path)
                if scheme is None:
                    return read_floats(self.path, tensor, self._dtype, head_dim)
                parts = read_affine(self.path, tensor, scheme, self._dtype, head_dim)
            self._taken = (path, parts)
        return parts.pop(part)

    def write_tokenizer(self, out: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json (with the chat template) and
        generation_config.json, and tokenizer.model for a sentencepiece vocabulary, into ``out``."""
        with naming(self.path):
            tokenizer.write(self._meta, Path(out), self.config["max_position_embeddings"])


def _dimensions(meta: dict[str, Any]) -> dict[str, int]:
    """The sizes of the model; ModelError for another architecture or one that is not computed."""
    found = meta.get("general.architecture")
    if found != "llama":
        raise ModelError(f"architecture {found!r}; GGUF files are supported for: llama")
    if experts := meta.get("llama.expert_count", 0):
        raise ModelError(f"a mixture of {experts} experts; mixtures from GGUF come later")
    changes = {f"llama.{key}" for key in _CHANGES.split()}
    odd = [f"{k} = {v}" for k, v in meta.items() if k in changes and v not in (0, 1)]
    if not meta.get("llama.attention.causal", True):
        odd.append("llama.attention.causal = False")
    if odd:
        raise ModelError(f"settings that this version cannot honour: {some(odd)}")
    dims = {
        "layers": _size(meta, "llama.block_count"),
        "h": _size(meta, "llama.embedding_length"),
        "f": _size(meta, "llama.feed_forward_length"),
        "heads": (heads := _size(meta, "llama.attention.head_count")),
        "kv_heads": (kv_heads := _size(meta, "llama.attention.head_count_kv", heads)),
    }
    size = _size(meta, "llama.attention.key_length", max(1, dims["h"] // heads))
    value, rope = (
        meta.get(f"llama.{key}", size) for key in ("attention.value_length", "rope.dimension_count")
    )
    if heads % kv_heads or size % 2 or value != size or rope != size:
        raise ModelError(
            f"{heads} heads of size {size} for {kv_heads} key/value heads, values of size {value}, "
            f"rope over {rope}; expected whole groups of heads and one even size"
        )
    return dims | {"head_dim": size, "q": heads * size, "k": kv_heads * size}


def _size(meta: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number; an array of one repeated value counts as that value."""
    value = meta.get(key, default)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = "missing" if value is None else f"{value!r:.60}"
        raise ModelError(f"{key} is {shown}; expected one positive whole number")
    return value


def _number(meta: dict[str, Any], key: str, default: float | None = None) -> float:
    """A float as it was written before float32 rounded it (1e-05, not 9.99999974e-06)."""
    value = meta.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelError(f"{key} is {value!r:.60}; expected a positive number")
    return float(str(np.float32(value)))


def _vocab_size(meta: dict[str, Any], tensors: dict[str, Tensor]) -> int:
    """Rows of the embedding, which must be the tokens' number or the one in the metadata."""
    tokens = len(meta["tokenizer.ggml.tokens"])
    stated = _size(meta, "llama.vocab_size", tokens)
    rows = tensors["token_embd.weight"].rows if "token_embd.weight" in tensors else stated
    if rows < tokens or rows not in (tokens, stated):
        raise ModelError(
            f"token_embd.weight has {rows} rows; expected one for each of {tokens} tokens "
            f"(llama.vocab_size: {stated})"
        )
    return rows


def _check_tensors(tensors: dict[str, Tensor], dims: dict[str, int], tied: bool) -> dict[str, str]:
    """GGUF name -> Hugging Face name of all tensors, whose names and shapes are right."""
    if mixture := [name for name in tensors if "_exps." in name or "ffn_gate_inp" in name]:
        raise ModelError(f"a mixture ({some(mixture)}); mixtures from GGUF come later")
    table = {k: v for k, v in _GLOBAL.items() if k != "output" or not tied}
    for i in range(min(dims["layers"], len(tensors))):  # a layer too many shows up as missing
        for kind, (name, code) in _LAYER.items():
            table[f"blk.{i}.{kind}"] = (f"model.layers.{i}.{name}", code)
    shapes = {f"{k}.weight": tuple(dims[c] for c in code) for k, (_, code) in table.items()}
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes and name != "rope_freqs.weight"]
    if missing or unknown:
        raise ModelError(
            f"wrong tensors for a llama of {dims['layers']} layers; "
            f"missing: {some(missing) or 'none'}; unknown: {some(unknown) or 'none'}"
        )
    if "rope_freqs.weight" in tensors:
        shapes["rope_freqs.weight"] = (dims["head_dim"] // 2,)
    wrong = [
        f"{name} {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if tensors[name].shape != shape or shape[-1] % GGML_QUANT_SIZES[tensors[name].type][0]
    ]
    if wrong:
        raise ModelError(f"shapes that contradict the metadata or the type: {some(wrong)}")
    return {f"{source}.weight": f"{name}.weight" for source, (name, _) in table.items()}


def _schemes(tensors: dict[str, Tensor]) -> dict[str, SourceScheme]:
    """Path, without ``.weight``, of each matrix that stays quantised; vectors become floats."""
    found = {
        name.removesuffix(".weight"): source_scheme(tensor.type)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2
    }
    return {path: scheme for path, scheme in found.items() if scheme}


def _requantised(
    tensors: dict[str, Tensor], schemes: dict[str, SourceScheme]
) -> dict[str, tuple[int, int, int]]:
    """See ``CheckpointFacts``."""
    found: dict[str, tuple[int, int, int]] = {}
    for path, scheme in schemes.items():
        if scheme.requantised:
            kind = tensors[f"{path}.weight"].type.name
            found[kind] = (found.get(kind, (0,))[0] + 1, scheme.bits, scheme.group)
    return found


def _quantisation(schemes: dict[str, SourceScheme]) -> dict[str, Any]:
    """mlx-lm's dict: the scheme that most matrices have, and by path the others."""
    configs = {path: scheme.to_config() for path, scheme in schemes.items()}
    (bits, group), _ = Counter((s.bits, s.group) for s in schemes.values()).most_common(1)[0]
    most = SourceScheme(bits, requantised=False, group=group).to_config()
    return most | {path: config for path, config in configs.items() if config != most}


def _default_dtype(infos: list[Tensor], quantised: bool) -> str:
    kinds = {t.type.name for t in infos}
    if quantised:
        return "float16"
    if kinds - {"F32", "F16"}:
        return "bfloat16"
    return "float16" if "F16" in kinds else "float32"


def _config(meta: dict[str, Any], dims: dict[str, int], dtype: str, tied: bool) -> dict[str, Any]:
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": dims["h"],
        "intermediate_size": dims["f"],
        "num_hidden_layers": dims["layers"],
        "num_attention_heads": dims["heads"],
        "num_key_value_heads": dims["kv_heads"],
        "rms_norm_eps": _number(meta, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(meta, "llama.rope.freq_base", 10000.0),
        "vocab_size": dims["v"],
        "max_position_embeddings": _size(meta, "llama.context_length"),
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }
    if dims["q"] != dims["h"] or "llama.attention.key_length" in meta:
        config["head_dim"] = dims["head_dim"]
    return config | tokenizer.config_ids(meta)


def _read_vector(path: Path, tensor: Tensor) -> np.ndarray:
    return dequantize(read_rows(path, tensor, 0, 1), tensor.type)[0]


def _rope_scaling(
    meta: dict[str, Any], config: dict[str, Any], factors: np.ndarray | None
) -> dict[str, Any] | None:
    prefix = "llama.rope.scaling."
    kind = meta.get(f"{prefix}type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"rope scaling {kind!r}; supported: none, linear, yarn")
    key = f"{prefix}factor" if meta.get(f"{prefix}factor") else "llama.rope.scale_linear"
    factor = _number(meta, key, 1.0) if kind != "none" and meta.get(key) else 1.0
    if factors is not None and not np.all(factors == 1):
        if factor != 1:
            raise ModelError(f"rope_freqs.weight and {kind} rope scaling; expected one of them")
        original = _size(meta, f"{prefix}original_context_length", 8192)
        return _llama3_scaling(factors, config["rope_theta"], original)
    if factor == 1:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = _size(
            meta, f"{prefix}original_context_length", config["max_position_embeddings"]
        )
        betas = [b for b in ("beta_fast", "beta_slow") if f"{prefix}yarn_{b}" in meta]
        scaling |= {b: _number(meta, f"{prefix}yarn_{b}") for b in betas}
    return scaling


def _llama3_scaling(factors: np.ndarray, theta: float, context: int) -> dict[str, Any]:
    """The llama-3 scaling that gives ``factors``; a GGUF holds only the outcome, so it is tried."""
    factor = float(factors.max())
    turns = context / (2 * np.pi * theta ** (np.arange(len(factors)) / len(factors)))
    smooth = np.clip((turns - 1) / 3, 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise ModelError(
            f"rope_freqs.weight is not llama-3 scaling by {factor:g} from {context} positions, the "
            "only kind known; convert the Hugging Face checkpoint instead"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": context,
    }
