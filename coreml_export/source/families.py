"""From a model to its description, family by family.

A family's function reads the arguments of the mlx-lm model that mlx_flash would run, and names the
tensors of each part. A family without a function here (see BUILDERS) is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from coreml_export.errors import ExportError
from mlx_flash.errors import ModelError
from mlx_flash.models import families
from mlx_flash.models.decoders.falcon import alibi_slopes
from mlx_flash.models.decoders.opt import FIRST_POSITION
from mlx_flash.models.rope_override import TwoRopes
from mlx_flash.models.settings.table import rules_of
from mlx_flash.models.settings.windows import windowed_layers

from .decoder_spec import Attention, Decoder, Ffn, Layer, Linear, Norm, Tensor
from .weights_source import Source

OPT_EPS = 1e-5  # in no config
ACTIVATIONS = ("relu", "relu2", "fatrelu", "gelu", "gelu_approx", "silu")


def describe(source: Source) -> Decoder:
    """The description of a source's model.

    Raises:
        ExportError: the family or its activation cannot be exported.
        ModelError: the config contradicts itself.
    """
    model_type = source.config.get("model_type")
    if model_type not in BUILDERS:
        raise ExportError(
            f"{source.path}: model_type {model_type!r} cannot be exported to Core ML; "
            f"expected one of {', '.join(sorted(BUILDERS))}"
        )
    table = families.find(source.config)
    if table.activation not in ACTIVATIONS:
        raise ExportError(
            f"{source.path}: activation {table.activation!r} cannot be exported to Core ML; "
            f"expected one of {', '.join(ACTIVATIONS)}"
        )
    decoder = BUILDERS[model_type](source, table)
    if decoder.heads % decoder.kv_heads:
        raise ModelError(
            f"{source.path}: {decoder.heads} query heads are not a multiple of "
            f"{decoder.kv_heads} key heads"
        )
    return decoder


def _linear(source: Source, path: str, rows: np.ndarray | None = None, part: str = "") -> Linear:
    bias = f"{path}.bias"
    return Linear(
        Tensor(f"{path}.weight", rows, part=part),
        Tensor(bias, rows, part=part) if bias in source.names else None,
    )


def _norm(source: Source, path: str, kind: str, eps: float) -> Norm:
    weight, bias = f"{path}.weight", f"{path}.bias"
    return Norm(
        kind,
        float(eps),
        Tensor(weight) if weight in source.names else None,
        Tensor(bias) if bias in source.names else None,
    )


def _ffn(source: Source, layer: str, table: families.Ffn) -> Ffn:
    path = f"{layer}.{table.module}"
    return Ffn(
        up=_linear(source, f"{path}.{table.up}"),
        down=_linear(source, f"{path}.{table.down}"),
        gate=_linear(source, f"{path}.{table.gate}") if table.gate else None,
        activation=table.activation,
        threshold=table.threshold,
        up_activation=table.up_activation,
    )


def _head(source: Source, embedding: str) -> Linear:
    tied = "lm_head.weight" not in source.names
    return Linear(Tensor(embedding)) if tied else _linear(source, "lm_head")


def split_halves(heads: int, head_dim: int, dims: int) -> np.ndarray:
    """Order of a projection's rows that turns neighbouring pairs into two halves of a head."""
    order = np.arange(heads * head_dim).reshape(heads, head_dim)
    pairs = order[:, :dims]
    return np.concatenate([pairs[:, 0::2], pairs[:, 1::2], order[:, dims:]], axis=1).reshape(-1)


def _limit(source: Source, rope: Any, limit: int | None) -> int | None:
    """The longest context for which one table of positions will do, and no layer's window counts.

    Args:
        rope: the module of rotary positions, if there is one.
        limit: what the family says.
    """
    limits = [limit]
    rules = rules_of(source.config)
    if rules and (found := windowed_layers(source.config, rules)):
        limits.append(found[0])
    if isinstance(rope, TwoRopes):
        limits.append(rope.limit)
    if isinstance(rope, DynamicNTKScalingRoPE):
        limits.append(rope.max_position_embeddings)
    return min((found for found in limits if found), default=None)


def _decoder(
    source: Source, layers: list[Layer], head_dim: int, embedding: str, **other: Any
) -> Decoder:
    """A description with what all families have in common.

    Args:
        embedding: name of the token embedding's weight.
        other: the remaining fields of ``Decoder``, and those that differ.
    """
    args = source.model.args
    common = {
        "model_type": source.config["model_type"],
        "d_model": args.hidden_size,
        "d_ffn": source.shapes[layers[0].ffn.up.weight.name][0],
        "heads": args.num_attention_heads,
        "kv_heads": args.num_attention_heads,
        "vocab": args.vocab_size,
        "head": _head(source, embedding),
        "scale": head_dim**-0.5,
    }
    fields = common | other
    fields["limit"] = _limit(source, fields.get("rope"), fields.get("limit"))
    return Decoder(layers=layers, head_dim=head_dim, embedding=Tensor(embedding), **fields)


def _layer_paths(source: Source, path: str) -> list[str]:
    return [f"{path}.{i}" for i in range(len(source.model.layers))]


def _llama(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    eps = args.rms_norm_eps
    head_dim = getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads
    rope = source.model.layers[0].self_attn.rope
    traditional = bool(getattr(rope, "traditional", False))
    sliding = getattr(args, "sliding_window", None) if _slides(source.model) else None
    orders = {}
    if traditional:  # neighbouring pairs are made two halves, which is how all are rotated here
        orders = {
            "q": split_halves(args.num_attention_heads, head_dim, head_dim),
            "k": split_halves(args.num_key_value_heads, head_dim, head_dim),
        }
    layers = []
    for path in _layer_paths(source, "model.layers"):
        attn = f"{path}.self_attn"
        projections = [
            _linear(source, f"{attn}.{p}_proj", orders.get(p), "halves" if p in orders else "")
            for p in "qkvo"
        ]
        norms = {
            key: _norm(source, f"{attn}.{key}", "rms", eps)
            for key in ("q_norm", "k_norm")
            if f"{attn}.{key}.weight" in source.names
        }
        layers.append(
            Layer(
                "pre",
                Attention(*projections, **norms),
                _ffn(source, path, table),
                _norm(source, f"{path}.input_layernorm", "rms", eps),
                _norm(source, f"{path}.post_attention_layernorm", "rms", eps),
            )
        )
    return _decoder(
        source,
        layers,
        head_dim,
        "model.embed_tokens.weight",
        kv_heads=args.num_key_value_heads,
        vocab=source.model.model.embed_tokens.weight.shape[0],
        final_norm=_norm(source, "model.norm", "rms", eps),
        rope=rope,
        rope_dims=head_dim,
        rope_traditional=traditional,
        limit=sliding,
    )


def _slides(model: Any) -> bool:
    return any(getattr(layer, "use_sliding", False) for layer in model.layers)


def _phi(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    head_dim = args.hidden_size // args.num_attention_heads
    eps = args.layer_norm_eps
    names = ("q_proj", "k_proj", "v_proj", "dense")
    layers = [
        Layer(
            "parallel",
            Attention(*(_linear(source, f"{path}.self_attn.{name}") for name in names)),
            _ffn(source, path, table),
            _norm(source, f"{path}.input_layernorm", "layer", eps),
            None,
        )
        for path in _layer_paths(source, "model.layers")
    ]
    return _decoder(
        source,
        layers,
        head_dim,
        "model.embed_tokens.weight",
        kv_heads=args.num_key_value_heads,
        head=_linear(source, "lm_head"),
        final_norm=_norm(source, "model.final_layernorm", "layer", eps),
        rope=source.model.layers[0].self_attn.rope,
        rope_dims=int(args.partial_rotary_factor * head_dim),
    )


def _opt(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    base, inner = "model.decoder", source.model.model.decoder
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    layers = [
        Layer(
            "pre" if args.do_layer_norm_before else "post",
            Attention(*(_linear(source, f"{path}.self_attn.{name}") for name in names)),
            _ffn(source, path, table),
            _norm(source, f"{path}.self_attn_layer_norm", "layer", OPT_EPS),
            _norm(source, f"{path}.final_layer_norm", "layer", OPT_EPS),
        )
        for path in _layer_paths(source, f"{base}.layers")
    ]
    last = None
    if "final_layer_norm" in inner:
        last = _norm(source, f"{base}.final_layer_norm", "layer", OPT_EPS)
    return _decoder(
        source,
        layers,
        args.hidden_size // args.num_attention_heads,
        f"{base}.embed_tokens.weight",
        final_norm=last,
        positions=Tensor(f"{base}.embed_positions.weight"),
        first_position=FIRST_POSITION,
        project_in=_linear(source, f"{base}.project_in") if "project_in" in inner else None,
        project_out=_linear(source, f"{base}.project_out") if "project_out" in inner else None,
        limit=args.max_position_embeddings,
        narrow=args.word_embed_proj_dim,
    )


def _falcon(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    heads, groups, dim = args.num_attention_heads, args.num_kv_heads, args.head_dim
    per = heads // groups + 2  # queries, key and value of a group lie together
    index = np.arange(groups * per * dim).reshape(groups, per, dim)
    picks = {"q": index[:, :-2], "k": index[:, -2], "v": index[:, -1]}
    two = args.num_ln_in_parallel_attn == 2
    first, second = ("ln_attn", "ln_mlp") if two else ("input_layernorm", None)
    if not args.parallel_attn:
        second = "post_attention_layernorm"
    eps = args.layer_norm_epsilon
    layers = []
    for path in _layer_paths(source, "transformer.h"):
        fused = f"{path}.self_attention.query_key_value"
        qkv = [_linear(source, fused, rows.reshape(-1), part) for part, rows in picks.items()]
        layers.append(
            Layer(
                "parallel" if args.parallel_attn else "pre",
                Attention(*qkv, _linear(source, f"{path}.self_attention.dense")),
                _ffn(source, path, table),
                _norm(source, f"{path}.{first}", "layer", eps),
                _norm(source, f"{path}.{second}", "layer", eps) if second else None,
            )
        )
    if args.alibi:
        positions = {"slopes": np.array(alibi_slopes(heads).astype(mx.float32))}
    else:
        rope = source.model.layers[0].self_attention.rope
        positions = {"rope": rope, "rope_dims": dim}
    return _decoder(
        source,
        layers,
        dim,
        "transformer.word_embeddings.weight",
        model_type="falcon",
        kv_heads=groups,
        final_norm=_norm(source, "transformer.ln_f", "layer", eps),
        **positions,
    )


def _persimmon(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    heads = args.num_attention_heads
    dim = args.hidden_size // heads
    eps = args.layer_norm_eps
    index = np.arange(heads * 3 * dim).reshape(heads, 3, dim)
    named = {"q_norm": "q_layernorm", "k_norm": "k_layernorm"} if args.qk_layernorm else {}
    layers = []
    for path in _layer_paths(source, "model.layers"):
        attn = f"{path}.self_attn"
        qkv = [
            _linear(source, f"{attn}.query_key_value", index[:, j].reshape(-1), part)
            for j, part in enumerate("qkv")
        ]
        norms = {key: _norm(source, f"{attn}.{name}", "layer", eps) for key, name in named.items()}
        layers.append(
            Layer(
                "pre",
                Attention(*qkv, _linear(source, f"{attn}.dense"), **norms),
                _ffn(source, path, table),
                _norm(source, f"{path}.input_layernorm", "layer", eps),
                _norm(source, f"{path}.post_attention_layernorm", "layer", eps),
            )
        )
    rope = source.model.layers[0].self_attn.rope
    return _decoder(
        source,
        layers,
        dim,
        "model.embed_tokens.weight",
        final_norm=_norm(source, "model.final_layernorm", "layer", eps),
        rope=rope,
        rope_dims=_rope_dims(rope),
    )


def _rope_dims(rope: Any) -> int:
    return int(getattr(rope, "dims", None) or rope.dim)


BUILDERS: dict[str, Callable[[Source, families.Ffn], Decoder]] = {
    **dict.fromkeys(("llama", "mistral", "sparsellama", "bamboo", "qwen2", "qwen3"), _llama),
    **dict.fromkeys(("falcon", "RefinedWeb", "RefinedWebModel"), _falcon),
    "opt": _opt,
    "persimmon": _persimmon,
    "phi": _phi,
}
