"""A mixture of experts paged from flash: bytes, reads, overlap, speed, guesses, policies, a prompt.

The model has the shape of Qwen3-30B-A3B (128 experts a layer, 8 a token, 2048 wide, 768 neurons an
expert, 32 heads, 4 of keys) with fewer layers, random weights, in mlx-community's format: 4 bits in
groups of 64, the router 8 bits. The vocabulary shrinks as the layers do, so that the head takes the
share of a token that it has in the full model. It is converted by the package and decodes the words
of a novel, one at a time, whatever it would say itself: every run of a comparison sees the same
tokens, and begins with the same experts in slots. The budget (``--share``) is half of the model.

Scales are float32 here, which makes an expert 5 bits a weight, not 4.5: MLX's CPU back end computes
packed matmuls in float32 many times faster than in bfloat16, and what is to be seen is reading.
``bytes`` is of rows with bfloat16 scales, ``--scales bfloat16`` runs all of it with them.

What random weights can say: bytes, reads, times for a given share of hits. Which experts are chosen
is made up: the router's rows have lengths of a log-normal (``SPREAD``), so that a few experts are
wanted often and none is never; a token's choice depends on the word, and less on what was before.
Hits, and what a guess is worth, are those of this model; a trained one has others. ``routing`` says
how uneven it came out.

    python -m benchmarks.mixture.mixture                    # 14 GB made; an hour on two cores
    python -m benchmarks.mixture.mixture --only reads,overlap
    python -m benchmarks.mixture.mixture --layers 2 --tokens 4 --pairs 2 --prompt-tokens 32

The last one is small, to try it.

Knows: the model, the package's pager and its reader, fio. Does not know: quality of text.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
from collections.abc import Callable
from datetime import date

from benchmarks.support.machine import OUT, machine_name

from .bench import Bench
from .choices import policies, prompt, routing
from .reads import reads, requests
from .sizes import expert_bytes, kernels
from .speed import lookahead, overlap, streaming

PARTS: dict[str, Callable[[Bench], dict]] = {
    "bytes": expert_bytes,
    "kernels": kernels,
    "prompt": prompt,
    "routing": routing,
    "policies": policies,
    "reads": reads,
    "requests": requests,
    "overlap": overlap,
    "streaming": streaming,
    "lookahead": lookahead,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="comma-separated: " + ",".join(PARTS))
    parser.add_argument("--layers", type=int, default=18, help="0.38 GB each")
    parser.add_argument("--vocab", type=int, help="default: as the layers are to the full model's")
    parser.add_argument("--scales", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--share", type=float, default=0.5, help="of the model, that is the budget")
    parser.add_argument("--warm", type=int, default=32, help="tokens before any figure counts")
    parser.add_argument("--tokens", type=int, default=16, help="of one run")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(PARTS)
    OUT.mkdir(exist_ok=True)
    results: dict = {"machine": machine_name(), "date": date.today().isoformat()}
    print(f"{results['machine']}, {results['date']}")
    bench = Bench(options)
    for name in wanted:
        print(f"\n{name}: {inspect.getdoc(PARTS[name])}", flush=True)
        try:
            results[name] = PARTS[name](bench)
        except RuntimeError as error:
            results[name] = {"skipped": str(error)}
        results[name]["load"] = [round(x, 1) for x in os.getloadavg()]
        for label, value in results[name].items():
            print(f"  {label:<42} {_text(value)}", flush=True)
    path = OUT / f"{bench.directory.path.name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(earlier | results, indent=1, default=float))
    print("\n" + json.dumps(results, default=float))


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{label} {_text(inner)}" for label, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
