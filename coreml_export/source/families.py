"""From a model to its description, family by family.

A family's function reads the arguments of the mlx-lm model that mlx_flash would run, and names the
tensors of each part.

Knows: llama, mistral, qwen2, qwen3, sparsellama, bamboo, opt, falcon, persimmon, phi. Does not
know: MIL, numbers of weights. Any other family is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from coreml_export.errors import ExportError
from mlx_flash.errors import ModelError
from mlx_flash.models import families
from mlx_flash.models.decoders.falcon import alibi_slopes
from mlx_flash.models.decoders.opt import FIRST_POSITION

from .decoder_spec import Attention, Decoder, Ffn, Layer, Linear, Norm, Tensor
from .weights_source import Source

ACTIVATIONS = ("relu", "relu2", "fatrelu", "gelu", "gelu_approx", "silu")


def describe(source: Source) -> Decoder:
    """The description of a source's model.

    Raises:
        ModelError: the family, or something in the config, cannot be exported.
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
            f"{source.path}: {decoder.heads} heads are no multiple of {decoder.kv_heads} of keys"
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


def _width(source: Source, linear: Linear) -> int:
    return source.shapes[linear.weight.name][0]


def _dynamic_limit(rope: Any, limit: int | None) -> int | None:
    """With dynamic scaling MLX's frequencies are fixed only up to the original length."""
    if type(rope).__name__ != "DynamicNTKScalingRoPE":
        return limit
    return min(rope.max_position_embeddings, limit or rope.max_position_embeddings)


def _llama(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    inner = source.model.model
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
    for i in range(len(source.model.layers)):
        path = f"model.layers.{i}"
        attn = f"{path}.self_attn"
        norms: dict[str, Norm] = {}
        for key in ("q_norm", "k_norm"):
            if f"{attn}.{key}.weight" in source.names:
                norms[key] = _norm(source, f"{attn}.{key}", "rms", args.rms_norm_eps)
        eps = args.rms_norm_eps
        projections = [
            _linear(source, f"{attn}.{p}_proj", orders.get(p), "halves" if p in orders else "")
            for p in "qkvo"
        ]
        layers.append(
            Layer(
                "pre",
                Attention(*projections, **norms),
                _ffn(source, path, table),
                _norm(source, f"{path}.input_layernorm", "rms", eps),
                _norm(source, f"{path}.post_attention_layernorm", "rms", eps),
            )
        )
    return Decoder(
        model_type=source.config["model_type"],
        d_model=args.hidden_size,
        d_ffn=_width(source, layers[0].ffn.up),
        heads=args.num_attention_heads,
        kv_heads=args.num_key_value_heads,
        head_dim=head_dim,
        vocab=inner.embed_tokens.weight.shape[0],
        layers=layers,
        embedding=Tensor("model.embed_tokens.weight"),
        head=_head(source, "model.embed_tokens.weight"),
        final_norm=_norm(source, "model.norm", "rms", args.rms_norm_eps),
        rope=rope,
        rope_dims=head_dim,
        rope_traditional=traditional,
        limit=_dynamic_limit(rope, sliding),
        scale=head_dim**-0.5,
    )


def _slides(model: Any) -> bool:
    return any(getattr(layer, "use_sliding", False) for layer in model.layers)


def _phi(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    head_dim = args.hidden_size // args.num_attention_heads
    eps = args.layer_norm_eps
    layers = []
    for i in range(len(source.model.layers)):
        path = f"model.layers.{i}"
        names = ("q_proj", "k_proj", "v_proj", "dense")
        layers.append(
            Layer(
                "parallel",
                Attention(*(_linear(source, f"{path}.self_attn.{name}") for name in names)),
                _ffn(source, path, table),
                _norm(source, f"{path}.input_layernorm", "layer", eps),
                None,
            )
        )
    rope = source.model.layers[0].self_attn.rope
    return Decoder(
        model_type="phi",
        d_model=args.hidden_size,
        d_ffn=_width(source, layers[0].ffn.up),
        heads=args.num_attention_heads,
        kv_heads=args.num_key_value_heads,
        head_dim=head_dim,
        vocab=args.vocab_size,
        layers=layers,
        embedding=Tensor("model.embed_tokens.weight"),
        head=_linear(source, "lm_head"),
        final_norm=_norm(source, "model.final_layernorm", "layer", eps),
        rope=rope,
        rope_dims=int(args.partial_rotary_factor * head_dim),
        scale=head_dim**-0.5,
    )


def _opt(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    inner = source.model.model.decoder
    order = "pre" if args.do_layer_norm_before else "post"
    layers = []
    for i in range(len(source.model.layers)):
        path = f"model.decoder.layers.{i}"
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        layers.append(
            Layer(
                order,
                Attention(*(_linear(source, f"{path}.self_attn.{name}") for name in names)),
                _ffn(source, path, table),
                _norm(source, f"{path}.self_attn_layer_norm", "layer", 1e-5),
                _norm(source, f"{path}.final_layer_norm", "layer", 1e-5),
            )
        )
    base = "model.decoder"
    head_dim = args.hidden_size // args.num_attention_heads
    return Decoder(
        model_type="opt",
        d_model=args.hidden_size,
        d_ffn=_width(source, layers[0].ffn.up),
        heads=args.num_attention_heads,
        kv_heads=args.num_attention_heads,
        head_dim=head_dim,
        vocab=args.vocab_size,
        layers=layers,
        embedding=Tensor(f"{base}.embed_tokens.weight"),
        head=_head(source, f"{base}.embed_tokens.weight"),
        final_norm=(
            _norm(source, f"{base}.final_layer_norm", "layer", 1e-5)
            if "final_layer_norm" in inner
            else None
        ),
        positions=Tensor(f"{base}.embed_positions.weight"),
        first_position=FIRST_POSITION,
        project_in=_linear(source, f"{base}.project_in") if "project_in" in inner else None,
        project_out=_linear(source, f"{base}.project_out") if "project_out" in inner else None,
        limit=args.max_position_embeddings,
        scale=head_dim**-0.5,
        narrow=args.word_embed_proj_dim,
    )


def _falcon(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    heads, groups, dim = args.num_attention_heads, args.num_kv_heads, args.head_dim
    per = heads // groups + 2  # queries, key and value of a group lie together
    index = np.arange(groups * per * dim).reshape(groups, per, dim)
    picks = {"q": index[:, :-2], "k": index[:, -2], "v": index[:, -1]}
    layers = []
    for i in range(len(source.model.layers)):
        path = f"transformer.h.{i}"
        fused = f"{path}.self_attention.query_key_value"
        qkv = [_linear(source, fused, rows.reshape(-1), part) for part, rows in picks.items()]
        two = args.num_ln_in_parallel_attn == 2
        first, second = ("ln_attn", "ln_mlp") if two else ("input_layernorm", None)
        if not args.parallel_attn:
            second = "post_attention_layernorm"
        eps = args.layer_norm_epsilon
        layers.append(
            Layer(
                "parallel" if args.parallel_attn else "pre",
                Attention(*qkv, _linear(source, f"{path}.self_attention.dense")),
                _ffn(source, path, table),
                _norm(source, f"{path}.{first}", "layer", eps),
                _norm(source, f"{path}.{second}", "layer", eps) if second else None,
            )
        )
    embedding = "transformer.word_embeddings.weight"
    slopes = None
    rope = None
    if args.alibi:
        slopes = np.array(alibi_slopes(heads).astype(mx.float32))
    else:
        rope = source.model.layers[0].self_attention.rope
    return Decoder(
        model_type="falcon",
        d_model=args.hidden_size,
        d_ffn=_width(source, layers[0].ffn.up),
        heads=heads,
        kv_heads=groups,
        head_dim=dim,
        vocab=args.vocab_size,
        layers=layers,
        embedding=Tensor(embedding),
        head=_head(source, embedding),
        final_norm=_norm(source, "transformer.ln_f", "layer", args.layer_norm_epsilon),
        rope=rope,
        rope_dims=0 if args.alibi else dim,
        slopes=slopes,
        scale=dim**-0.5,
    )


def _persimmon(source: Source, table: families.Ffn) -> Decoder:
    args = source.model.args
    heads = args.num_attention_heads
    dim = args.hidden_size // heads
    index = np.arange(heads * 3 * dim).reshape(heads, 3, dim)
    layers = []
    eps = args.layer_norm_eps
    for i in range(len(source.model.layers)):
        path = f"model.layers.{i}"
        attn = f"{path}.self_attn"
        qkv = [
            _linear(source, f"{attn}.query_key_value", index[:, j].reshape(-1), part)
            for j, part in enumerate("qkv")
        ]
        norms = {}
        if args.qk_layernorm:
            for key, name in (("q_norm", "q_layernorm"), ("k_norm", "k_layernorm")):
                norms[key] = _norm(source, f"{attn}.{name}", "layer", eps)
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
    return Decoder(
        model_type="persimmon",
        d_model=args.hidden_size,
        d_ffn=_width(source, layers[0].ffn.up),
        heads=heads,
        kv_heads=heads,
        head_dim=dim,
        vocab=args.vocab_size,
        layers=layers,
        embedding=Tensor("model.embed_tokens.weight"),
        head=_head(source, "model.embed_tokens.weight"),
        final_norm=_norm(source, "model.final_layernorm", "layer", eps),
        rope=rope,
        rope_dims=_rope_dims(rope),
        limit=_dynamic_limit(rope, None),
        scale=dim**-0.5,
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
