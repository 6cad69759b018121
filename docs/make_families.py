"""Writes docs/families.md from the tables that the package runs by.

    python docs/make_families.py

A test compares the page with the tables, so run this after a family is added.
"""

from pathlib import Path
from types import ModuleType

from coreml_export.source.families import BUILDERS
from mlx_flash.models.families import FAMILIES, Ffn, projections
from mlx_flash.models.mixtures import ALIASES, MIXTURES, Mixture
from mlx_flash.models.registry import DECODERS, OVERRIDE_DECODERS

PAGE = Path(__file__).with_name("families.md")

HEAD = """# Model families

Written by `docs/make_families.py` from
[families.py](../mlx_flash/models/families.py) and [mixtures.py](../mlx_flash/models/mixtures.py);
a test holds it against them. The first column is `model_type` in a Hugging Face `config.json`.
An unknown family is an error. So is a config that names an activation which would be ignored.

Quantised weights: affine with 2 to 8 bits in groups of 32, 64 or 128, MXFP4 and MXFP8, the same for
all tensors or mixed. They come from `convert -q`, from checkpoints that mlx-lm quantised, and from
GGUF files ([gguf.md](gguf.md)).
"""

DENSE = """
## Dense models: {count} families

*FFN*: which projections a neuron's row is cut from. *Activation*: what the FFN computes; where the
config chooses, its default and the other values that are followed. With `relu`, `relu2`, `fatrelu`
or dReLU only the rows that fire are read, else every row. *Decoder*: whose class runs it, that of
mlx-lm or of this package (`mlx_flash/models/decoders/`). Where mlx-lm ignores the config's
activation, this package puts in an FFN that does not. *Core ML*: whether `coreml_export` takes it.

| model_type | FFN | activation | decoder | Core ML |
|---|---|---|---|---|
"""

EXPERTS = """
## Mixtures of experts: {count} families

A row is an expert. *Experts*: where a decoder layer keeps them, mlx-lm's module. *Router*: what
scores them, which `--lookahead` asks beforehand. A family with *dense members* is in both tables;
its config says which kind a model is.

| model_type | experts | router | dense members |
|---|---|---|---|
"""

ALIASED = """
mlx-lm runs these as another family, and so does this package: {aliases}.
"""


def dense_row(model_type: str, ffn: Ffn) -> str:
    """A family of dense models as a line of the table."""
    names = list(dict.fromkeys(projections(ffn).values()))
    place = f"`{ffn.module}`: {', '.join(names)}"
    if ffn.fused:
        place += " (gate and up in one)"
    if "gate" not in ffn.parts:
        place += " (no gate)"
    core_ml = "yes" if model_type in BUILDERS else ""
    return f"| {model_type} | {place} | {activation(ffn)} | {decoder(model_type)} | {core_ml} |"


def activation(ffn: Ffn) -> str:
    """What a family's FFN computes."""
    if ffn.up_activation:
        return f"{ffn.activation} on gate and up (dReLU)"
    if not ffn.follows_config:
        return ffn.activation
    others = [name for name in dict.fromkeys(ffn.followed.values()) if name != ffn.activation]
    return f"{ffn.activation}; {', '.join(others)}" if others else ffn.activation


def decoder(model_type: str) -> str:
    """Whose class runs a family."""
    if model_type in DECODERS:
        return f"ours ({file_name(DECODERS[model_type])})"
    if model_type in OVERRIDE_DECODERS:
        return f"mlx-lm; another activation: ours ({file_name(OVERRIDE_DECODERS[model_type])})"
    return "mlx-lm"


def file_name(module: ModuleType) -> str:
    """Name of the file of a decoder, without .py."""
    return module.__name__.rpartition(".")[2]


def mixture_row(model_type: str, mixture: Mixture) -> str:
    """A family of mixtures as a line of the table."""
    router = f"`{mixture.router.module}`" if mixture.router else "not foretold"
    dense = "yes" if mixture.dense else ""
    gate = "" if mixture.gated else " (no gate)"
    return f"| {model_type} | `{mixture.module}`{gate} | {router} | {dense} |"


def page() -> str:
    """The page's text."""
    dense = [dense_row(name, FAMILIES[name]) for name in sorted(FAMILIES, key=str.lower)]
    experts = [mixture_row(name, MIXTURES[name]) for name in sorted(MIXTURES, key=str.lower)]
    aliases = ", ".join(f"{alias} (as {name})" for alias, name in sorted(ALIASES.items()))
    return "".join(
        [
            HEAD,
            DENSE.format(count=len(FAMILIES)),
            "\n".join(dense) + "\n",
            EXPERTS.format(count=len(MIXTURES)),
            "\n".join(experts) + "\n",
            ALIASED.format(aliases=aliases),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
