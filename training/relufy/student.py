"""The student: the dense model with another activation and low-rank deltas on every projection.

Beside the FFN runs a bypass, a dense matrix [d, d] from the FFN's input to its output: what SiLU
gives where its argument is negative is not nothing, but near a constant, and a constant times up's
output is linear in the input. Without it SmolLM2's perplexity rises a hundredfold before training;
with a constant of -0.1 in the place of the zeros by a factor of 2.3.

Base weights are shared with the teacher and never change. The FFN gives ``where(g > t, g, 0) * u``
with g the gate's output, u up's (for dReLU ``relu(g) * relu(u)``, PowerInfer-2's Bamboo) and t a
threshold of the layer: 0 for ReLU, else FATReLU (ProSparse, arXiv 2402.13516, section 3.3).

Knows: modules, what counts as a zero. Does not know: losses, data, files.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

ACTIVATIONS = ("relu", "fatrelu", "drelu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """``x W^T + (x A^T) B^T`` with W fixed [out, in], A [rank, in], B [out, rank]."""

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach(), persistent=False)
        rows, columns = weight.shape
        start = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.a = nn.Parameter(start)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = functional.linear(functional.linear(x, self.a), self.b)
        return functional.linear(x, self.weight) + delta


class SparseMLP(nn.Module):
    """llama's FFN with zeros; what the last pass gave is kept for losses and counts.

    Args of the last pass: ``inner`` [..., rows], what goes into down; ``zeros``, the share of rows
    whose gate (or for dReLU gate or up) is not active.
    """

    def __init__(
        self,
        mlp: nn.Module,
        activation: str,
        rank: int,
        generator: torch.Generator,
        bypass: bool,
    ) -> None:
        super().__init__()
        self.activation = activation
        for name in FFN:
            setattr(self, name, LoRALinear(getattr(mlp, name).weight, rank, generator))
        self.register_buffer("threshold", torch.zeros(()))
        columns = self.up_proj.weight.shape[1]
        self.bypass = nn.Parameter(torch.zeros(columns, columns)) if bypass else None
        self.inner = self.zeros = None

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        active = gate > self.threshold
        if self.activation == "drelu":
            active = active & (up > 0)
        self.zeros = 1 - active.detach().float().mean()
        self.inner = torch.where(active, gate, 0) * up
        return self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.hidden(x)) + self.beside(x)

    def beside(self, x: torch.Tensor) -> torch.Tensor | float:
        """What the bypass adds."""
        return 0.0 if self.bypass is None else functional.linear(x, self.bypass)


def make(
    dense: LlamaForCausalLM,
    activation: str,
    ffn_rank: int,
    attention_rank: int,
    seed: int,
    bypass: bool = True,
) -> LlamaForCausalLM:
    """A student that shares the dense model's weights; B is 0, so only the activation differs.

    Raises:
        ValueError: dReLU with a bypass, which no decoder of this package has.
    """
    if bypass and activation == "drelu":
        raise ValueError("dReLU goes without a bypass; add --no-bypass")
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = LlamaForCausalLM(dense.config)
    model.load_state_dict(dense.state_dict(), assign=True)
    model.tie_weights()
    model.model.rotary_emb = dense.model.rotary_emb
    model.requires_grad_(False)
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ATTENTION:
            weight = getattr(attention, name).weight
            setattr(attention, name, LoRALinear(weight, attention_rank, generator))
        layer.mlp = SparseMLP(layer.mlp, activation, ffn_rank, generator, bypass)
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(module.weight.detach().clone())
    return model.train()


def ffns(model: LlamaForCausalLM) -> list[SparseMLP]:
    """The FFN of each layer."""
    return [layer.mlp for layer in model.model.layers]


def trained(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """What training changes, by the names of the modules: factors, norms, thresholds."""
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return state | {
        f"model.layers.{i}.mlp.threshold": ffn.threshold for i, ffn in enumerate(ffns(model))
    }


def restore(model: LlamaForCausalLM, state: dict[str, torch.Tensor]) -> None:
    """Put back what ``trained`` gave."""
    with torch.no_grad():
        for name, value in trained(model).items():
            value.copy_(state[name])


class Streams:
    """Collects the residual stream after every layer of a model, [layers] of [batch, t, d]."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.found: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        self.found.append(output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[torch.Tensor]:
        found, self.found = self.found, []
        return found
