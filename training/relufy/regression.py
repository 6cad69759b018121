"""Where training begins: bypass and down projection fitted to what the dense layer gives.

Layer by layer, with the student's own stream as input, so that each layer also mends what those
before it lost. The bypass is the least-squares map from the FFN's input to what is missing. The
least-squares delta of down for what then is missing is cut to the adapter's rank where that costs
least (reduced-rank regression): with H the inner activations and E what is missing,

    delta = E H^T (H H^T + ridge)^-1,    B = the first eigenvectors of delta H H^T delta^T,
    A = B^T delta.

A token weighs as much as one over the mean square of the dense stream: a few tokens have norms
a hundred times the others'.

Knows: the student, that regression. Does not know: losses on logits, files.
"""

from __future__ import annotations

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from .student import SparseMLP, ffns

RIDGE = 0.01  # of the mean of H H^T's diagonal
BYPASS_RIDGE = 0.001
BATCH = 8  # windows
LEAST = 0.02  # threshold in standard deviations of a layer's gates


@torch.no_grad()
def begin(
    dense: LlamaForCausalLM, student: LlamaForCausalLM, windows: torch.Tensor, zeros: float | None
) -> list[float]:
    """Set thresholds for a share of zeros and fit down's factors, in place.

    Args:
        windows: tokens, int64 [windows, length].
        zeros: share of gates not active that each layer's threshold is set to; None leaves 0.

    Returns:
        What each layer's stream misses of the dense one, as relative squared error.
    """
    stream = dense.model.embed_tokens(windows)
    mine = stream.clone()
    positions = torch.arange(windows.shape[1])[None]
    rotary = dense.model.rotary_emb(stream[:1], positions)
    errors = []
    for theirs, layer in tqdm(
        list(zip(dense.model.layers, student.model.layers, strict=True)), desc="regression"
    ):
        wanted = [theirs(x, position_embeddings=rotary) for x in stream.split(BATCH)]
        stream = torch.cat([w[0] if isinstance(w, tuple) else w for w in wanted])
        middle = torch.cat(
            [
                x + layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary,
                                    attention_mask=None)[0]
                for x in mine.split(BATCH)
            ]
        )  # fmt: skip
        ffn = layer.mlp
        inputs = layer.post_attention_layernorm(middle)
        if zeros is not None:
            gates = torch.cat([ffn.gate_proj(x).flatten() for x in inputs[::8].split(BATCH)])
            some = gates[::7]
            # Never 0: a threshold grows by factors, and one of the whole model is folded in.
            ffn.threshold.copy_(some.quantile(zeros).clamp(min=LEAST * some.std()))
        weight = stream.pow(2).mean(-1, keepdim=True).rsqrt().flatten(0, 1)
        weight = weight.view(*stream.shape[:2], 1)
        if ffn.bypass is not None:
            _fit_bypass(ffn, inputs, stream - middle, weight)
        rows = ffn.down_proj.weight.shape[1]
        gram, cross = torch.zeros(rows, rows), torch.zeros(ffn.down_proj.weight.shape)
        pieces = zip(
            inputs.split(BATCH), (stream - middle).split(BATCH),
            weight.split(BATCH), strict=True,
        )  # fmt: skip
        for x, target, w in pieces:
            inner = ffn.hidden(x)
            missing = (target - ffn.down_proj(inner) - ffn.beside(x)) * w
            inner = (inner * w).flatten(0, 1)
            gram += inner.T @ inner
            cross += missing.flatten(0, 1).T @ inner
        _cut(ffn.down_proj, gram, cross)
        mine = torch.cat(
            [m + ffn(x) for m, x in zip(middle.split(BATCH), inputs.split(BATCH), strict=True)]
        )
        lost = (mine - stream).pow(2).sum(-1) / stream.pow(2).sum(-1)
        errors.append(lost.mean().item())
    return errors


def _fit_bypass(
    ffn: SparseMLP, inputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
) -> None:
    gram, cross = torch.zeros_like(ffn.bypass), torch.zeros_like(ffn.bypass)
    pieces = zip(inputs.split(BATCH), targets.split(BATCH), weight.split(BATCH), strict=True)
    for x, target, w in pieces:
        missing = ((target - ffn.down_proj(ffn.hidden(x))) * w).flatten(0, 1)
        weighted = (x * w).flatten(0, 1)
        gram += weighted.T @ weighted
        cross += missing.T @ weighted
    ridge = BYPASS_RIDGE * gram.diagonal().mean()
    ffn.bypass.copy_(torch.linalg.solve(gram + ridge * torch.eye(len(gram)), cross.T).T)


def _cut(down: torch.nn.Module, gram: torch.Tensor, cross: torch.Tensor) -> None:
    ridge = RIDGE * gram.diagonal().mean()
    delta = torch.linalg.solve(gram + ridge * torch.eye(len(gram)), cross.T).T
    _, vectors = torch.linalg.eigh(delta @ gram @ delta.T)
    b = vectors[:, -down.a.shape[0] :]
    a = b.T @ delta
    # The same size on both sides, so that one learning rate fits both.
    size = torch.sqrt(a.norm(dim=1) / b.norm(dim=0)).clamp(min=1e-6)
    down.a.copy_(a / size[:, None])
    down.b.copy_(b * size[None])


def zeros_of(student: LlamaForCausalLM) -> float:
    """Mean over layers of the last pass."""
    return torch.stack([ffn.zeros for ffn in ffns(student)]).mean().item()
