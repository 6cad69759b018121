"""What is in a model directory, and what each budget would hold of it.

Knows: how to count and to show. Does not know: how fast anything is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_flash.common.platform import current_platform
from mlx_flash.common.sizes import show, with_margin
from mlx_flash.model_directory import expert_demand_file
from mlx_flash.model_directory.config import read_config
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.models import mixtures
from mlx_flash.models.quantized_rows import scheme_from
from mlx_flash.predictors.selection import Selection
from mlx_flash.runtime.load import choose_predictors, load_tokenizer
from mlx_flash.runtime.memory_plan import least_budget, plan_for
from mlx_flash.runtime.memory_requirements import MemoryRequirements, memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

STEPS = 5  # budgets shown, from the least to what the dense model takes


def describe(directory: ModelDirectory, options: PagingOptions | None = None) -> dict[str, Any]:
    """Figures of a model directory as a JSON-ready dict; sizes in bytes.

    Args:
        options: how budgets would be planned; their own budget does not count.
    """
    options = options or PagingOptions()
    rows = directory.rows
    tokenizer = load_tokenizer(directory)  # a part of what a process takes
    selection = choose_predictors(directory, options)
    reader = RowReader(rows)
    try:
        needs = memory_requirements(directory, reader, options, selection)
    finally:
        reader.close()
    del tokenizer
    count = sum(layer.rows for layer in rows.layers)
    demand = expert_demand_file.read_for(directory)
    least, dense = with_margin(least_budget(needs, options)), with_margin(needs.dense)
    return {
        "path": str(directory.path),
        "model_type": directory.config["model_type"],
        "unit": directory.unit,
        "activation": directory.config["flash"]["activation"],
        "experts": _experts(directory),
        "dtype": directory.config["flash"]["dtype"],
        "quantization": _quantization(directory.config),
        "requantised": directory.config["flash"]["requantised"],
        "parameters": directory.config["flash"]["parameters"],
        "resident_bytes": needs.resident,
        "layers": len(rows.layers),
        "rows": count,
        "row_bytes": rows.layout.stride,
        "row_bytes_without_padding": rows.layout.ideal_bytes,
        "row_file_bytes": rows.bytes,
        "parts": [part.name for part in rows.layout.parts],
        "context": needs.context,
        "direct_reads": reader.direct,
        "least_bytes": least,
        "dense_bytes": dense,
        "row_order": _row_order(directory),
        "predictor": _predictor(selection),
        "expert_demand": demand and {"used": demand.used, "measured": demand.measured},
        "budgets": [_budget(needs, options, ram) for ram in _budgets(least, dense)],
    }


def _row_order(directory: ModelDirectory) -> dict[str, Any] | None:
    """By which text ``reorder`` moved the rows; None where they are in the checkpoint's order."""
    done = directory.config["flash"].get("row_order")
    if not isinstance(done, dict):
        return None
    return {key: done.get(key) for key in ("text", "tokens", "predictor")}


def _experts(directory: ModelDirectory) -> dict[str, int] | None:
    """How many experts a layer of a mixture has, and a token takes."""
    if directory.mixture is None:
        return None
    experts, top_k = mixtures.expert_counts(directory.config, directory.mixture)
    return {"per_layer": experts, "per_token": top_k}


def _quantization(config: dict[str, Any]) -> dict[str, int]:
    """QuantScheme -> how many modules the config names with it; the default one counts as 0."""
    found = config.get("quantization")
    if not found:
        return {}
    own = [str(scheme_from(v)) for v in found.values() if isinstance(v, dict)]
    return {str(scheme_from(found)): 0} | {name: own.count(name) for name in own}


def remarks(path: Path) -> list[str]:
    """What a conversion did that its user may not expect: types quantised anew, or not at all."""
    config = read_config(path)
    flash = config["flash"]
    lines = [
        f"Quantised anew: {count} tensors of {kind}, to {bits} bits in groups of {group}"
        for kind, (count, bits, group) in flash["requantised"].items()
    ]
    parts = [part for layout in flash["layouts"] for part in layout["parts"]]
    floats = {p["name"] for p in parts if p["name"].endswith(".weight") and p["dtype"] != "U32"}
    if config.get("quantization") and floats:
        names = ", ".join(sorted(name.removesuffix(".weight") for name in floats))
        lines.append(f"Left as floats, for want of whole groups or as asked: {names}")
    return lines


def _predictor(selection: Selection | None) -> dict[str, Any] | None:
    if selection is None:
        return None
    return {
        "kind": selection.kind,
        "exact": selection.exact,
        "bytes": sum(selection.nbytes),
        "measured": selection.measured,
    }


def _budgets(least: int, dense: int) -> list[int]:
    """Some from the least to what keeps every row, as far as the machine has so much."""
    top = min(dense, current_platform().machine_bytes())
    if least > top:
        return []
    return [least + (top - least) * i // (STEPS - 1) for i in range(STEPS)]


def _budget(needs: MemoryRequirements, options: PagingOptions, ram: int) -> dict[str, Any]:
    plan = plan_for(needs, options.replace(ram=ram), current_platform().machine_bytes())
    return {
        "ram_bytes": ram,
        "kept_layers": len(plan.kept),
        "kept_bytes": sum(needs.layers[i] for i in plan.kept),
        "streamed_bytes_per_token": sum(needs.layers[i] for i in plan.streamed),
        "cached_rows": sum(plan.slots.values()),
        "prompt_chunk_tokens": plan.step,
    }


def report(info: dict[str, Any]) -> str:
    """``describe``'s figures as text."""
    padding = info["row_bytes"] / info["row_bytes_without_padding"] - 1
    lines = [
        f"{info['path']}: {info['model_type']}, {info['parameters'] / 1e6:.1f} M parameters, "
        f"{_numbers(info)}",
        f"  resident   {show(info['resident_bytes'])}",
        _rows_line(info, padding),
        f"  reads      {'direct' if info['direct_reads'] else 'through the page cache'}",
        f"  least RAM  {show(info['least_bytes'])}; everything resident from "
        f"{show(info['dense_bytes'])} (context of {info['context']} tokens)",
    ]
    for kind, (count, bits, _) in info["requantised"].items():
        lines.append(f"  note       {count} tensors of {kind} were quantised anew, to {bits} bits")
    if order := info["row_order"]:
        lines.append(
            f"  row order  reordered: by what {order['tokens']} tokens of {order['text']} ask for "
            "together"
        )
    if predictor := info["predictor"]:
        lines.append(_predictor_line(predictor))
    if demand := info["expert_demand"]:
        lines.append(_demand_line(demand))
    if info["budgets"]:
        lines.append("  RAM budget   layers kept   FFN kept    read per token   prompt chunk")
    for row in info["budgets"]:
        kept = f"{row['kept_layers']} of {info['layers']}"
        lines.append(
            f"  {show(row['ram_bytes']):>10}   {kept:>11}   {show(row['kept_bytes']):>8}"
            f"   {_read(row, info):>14}"
            f"   {row['prompt_chunk_tokens']:>5} tokens"
        )
    return "\n".join(lines)


def _numbers(info: dict[str, Any]) -> str:
    """The float type, and what is quantised."""
    schemes = list(info["quantization"])
    return " + ".join([info["dtype"], *schemes[:3]]) + (", ..." if len(schemes) > 3 else "")


def _rows_line(info: dict[str, Any], padding: float) -> str:
    line = f"  rows       {show(info['row_file_bytes'])}: {info['layers']} layers, "
    tail = f"{100 * padding:.1f} % padding)"
    if experts := info["experts"]:
        return line + (
            f"{info['rows']} experts of {show(info['row_bytes'])} ({tail}, "
            f"{experts['per_token']} of {experts['per_layer']} per token"
        )
    if info["unit"] == "layer":
        return line + (
            f"each read whole, {show(info['row_bytes'])} ({tail}, activation {info['activation']}"
        )
    return line + (
        f"{info['rows']} rows of {info['row_bytes']} bytes ({' + '.join(info['parts'])}; {tail}, "
        f"activation {info['activation']}"
    )


def _read(row: dict[str, Any], info: dict[str, Any]) -> str:
    """What a token reads; of rows that are predicted only the size of their cache is known."""
    if row["cached_rows"]:
        return f"{100 * row['cached_rows'] / info['rows']:.0f} % cached"
    return show(row["streamed_bytes_per_token"])


def _demand_line(demand: dict[str, Any]) -> str:
    measured = demand["measured"]
    if not expert_demand_file.FIGURES.keys() <= measured.keys():
        return "  demand     measured, the file does not say on what"
    line = f"  demand     measured on {measured['tokens']} tokens of {measured['text']}: "
    if not demand["used"]:
        return line + "layers get equal shares, others did no better"
    return line + f"{100 * measured['gain']:.1f} % fewer misses than equal shares"


def _predictor_line(predictor: dict[str, Any]) -> str:
    line = f"  predictor  {predictor['kind']}, {show(predictor['bytes'])}, "
    if predictor["exact"]:
        return line + "exact"
    measured = predictor["measured"]
    dense, predicted = measured.get("perplexity_dense"), measured.get("perplexity_predicted")
    if not dense or not predicted:
        return line + "lossy, the loss was not measured"
    return line + f"lossy: perplexity {predicted:.2f}, dense {dense:.2f}"
