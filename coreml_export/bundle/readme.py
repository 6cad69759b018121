"""README.md of an export: for whoever builds the app, with the calls in Swift."""

from __future__ import annotations

from typing import Any

HEAD = """# {model_type}, for Core ML

Made by `coreml_export`. {layers} layers, {d_model} wide, vocabulary {vocabulary}, context {context}
tokens, {quantisation} weights, least system {target}. `manifest.json` has every name, shape and hash
below; `parity.md` what was measured; `golden.npz` tokens and logits to compare with.

Read the manifest, look up what is here as "chain", and check the hashes once after installing.
Tokens are made with `tokenizer/tokenizer.json` (swift-transformers' `AutoTokenizer` reads the
directory); stop at the tokens of `eos`.
"""

DENSE = """
## The decoder

Functions take: `inputIds` int32 [1, n], `position` int32 [1] (of the first of them), `causalMask`
float16 [1, 1, n, {context}] (0 where a query may look, -10000 elsewhere, keys behind the last token
included). n is 1 for `decode` and 64 for `prefill`. States `keyCache`, `valueCache`. They give
`logits` {sums} [1, n, {vocabulary}]. Where there is more than one package, `dense.chains` of the
manifest says which is called after which: what one gives as `hiddenOut` (or `hidden`) the next takes
as `hidden`, in the type that its entry says.

A last chunk of a prompt that is shorter than 64 may be filled up with anything: its rows are
overwritten by the tokens that follow, and masked until then. Use `prefill` only while
`position + 64 <= {context}`, then `decode`.

```swift
import CoreML

let context = {context}

func load(_ url: URL, _ function: String) async throws -> MLModel {{
    let configuration = MLModelConfiguration()
    configuration.computeUnits = .{units}
    configuration.functionName = function
    return try await MLModel.load(contentsOf: url, configuration: configuration)
}}

// {first}.mlmodelc is what Xcode, or MLModel.compileModel(at:), makes of {first}.mlpackage.
let url = Bundle.main.url(forResource: "{first}", withExtension: "mlmodelc")!
let decode = try await load(url, "{function}")
let state = decode.makeState()  // one for each package; prefill of the same package takes it, too

func mask(position: Int, count: Int) throws -> MLMultiArray {{
    let array = try MLMultiArray(
        shape: [1, 1, count as NSNumber, context as NSNumber], dataType: .float16)
    array.withUnsafeMutableBufferPointer(ofType: Float16.self) {{ cells, _ in
        for query in 0..<count {{
            for key in 0..<context {{
                cells[query * context + key] = key <= position + query ? 0 : -1e4
            }}
        }}
    }}
    return array
}}

func step(_ token: Int32, at position: Int) async throws -> MLMultiArray {{
    let ids = try MLMultiArray(shape: [1, 1], dataType: .int32)
    ids[0] = token as NSNumber
    let at = try MLMultiArray(shape: [1], dataType: .int32)
    at[0] = position as NSNumber
    let input = try MLDictionaryFeatureProvider(dictionary: [
        "inputIds": ids, "position": at, "causalMask": mask(position: position, count: 1),
    ])
    let output = try await decode.prediction(from: input, using: state)
    return output.featureValue(for: "logits")!.multiArrayValue!
}}
```

A mask as large as `prefill`'s is made once and kept; only its start moves. Do not use the generation
loop of swift-transformers for this model: its mask runs one step long.
"""

PAGED = """
## The paged packages

For models larger than the memory an app gets, on CPU and GPU (each token takes many calls, which the
Neural Engine is too slow to start). A token:

1. Row `token` of `{embedding}` (float16 [{vocabulary}, {d_embedding}], map it) is `hidden` [1, 1, {d_embedding}].
2. `hidden`, `residual` and `hiddenOut` between layers are {sums}. For each layer i: `attention_i` of `paged.mlpackage` with `hidden`, `position`, `causalMask` and a
   state of its own (`makeState()` of that function) gives `residual` and `ffnInput`.
3. `predict_i` of `predictor.mlpackage` with `ffnInput` and `threshold` ([1] float16, default in
   `paged.thresholds`) gives `mask` [1, {rows}], 1 where a row is needed.
4. Either all those rows are handed over: `ffn_rows_N` with `residual`, `ffnInput`, `rows` [N, {width}],
   N the smallest of {buckets} that holds them, the rest zeros.
5. Or only the rows that are not in Core ML's memory yet: `ffn_cache_N` with `residual`, `ffnInput`,
   `newRows` [N, {width}], `slots` [N] int32 (N of {new_rows}) and the state `rowCache`
   [{cache_rows}, {state_width}], one for each layer. It writes the rows to their slots, then computes over
   all slots. Unused entries of `newRows` are zeros and go to slot {last}, which stays empty. More rows
   than fit: call again, the last answer counts.
{coded}6. `hiddenOut` is the next layer's `hidden`. After the last layer `head` gives `logits`.

Rows lie in `{file}`: row r of layer i at byte `offsets[i] + r * {stride}`, {width} {dtype} numbers:
{parts} of {d_model} each{biases}. The stride suits direct reads (`F_NOCACHE`) and mapping:

```swift
let file = try FileHandle(forReadingFrom: rowsURL)
fcntl(file.fileDescriptor, F_NOCACHE, 1)
let rows = try MLMultiArray(shape: [{bucket}, {width}], dataType: .{dtype})
rows.withUnsafeMutableBytes {{ memory, _ in
    for (slot, row) in wanted.enumerated() {{
        pread(file.fileDescriptor, memory.baseAddress! + slot * {bytes}, {bytes},
              off_t(offsets[layer] + row * {stride}))
    }}
}}
```

`coreml_export/verification/paged_host.py` is this loop in Python, with the choice of slots; it is what parity was
measured with.
"""

CODED = """   Rows are int8; what lies behind a row's numbers goes into the input `extra` [N, {extra}] float16
   of both kinds of function.
"""

TAIL = """
## What was not checked

Nothing here ran on Apple hardware. `parity.md` is program parity: an interpreter in numpy walked the
programs in these packages. On a Mac, `python -m coreml_export MODEL --check {name} --coreml` adds Core
ML's own numbers. int4 in blocks runs on CPU and GPU only.
"""


def text(content: dict[str, Any]) -> str:
    """The README of an export with this manifest."""
    about = content["architecture"]
    shared = {
        **about,
        "context": content["context"],
        "quantisation": {"none": "float16"}.get(content["quantisation"], content["quantisation"]),
        "target": content["target"].replace("iOS", "iOS "),
        "sums": "float32" if content["precision"] == "mixed" else "float16",
    }
    page = HEAD.format(**shared)
    if "dense" in content:
        first, function = content["dense"]["chains"]["decode"][0]
        page += DENSE.format(**shared, first=first, function=function, units=content["units"])
    if "paged" in content:
        paged, rows = content["paged"], content["paged"]["rows"]
        int8 = rows["dtype"] == "int8"
        biases = "".join(f", the bias of {name}" for name in rows["biases"])
        scales = ", ".join(f"the scale of {name}" for name in rows["parts"])
        page += PAGED.format(
            vocabulary=about["vocabulary"],
            d_model=about["d_model"],
            d_embedding=content["embedding"]["shape"][1],
            embedding=content["embedding"]["file"],
            rows=rows["rows"],
            width=rows["width"],
            state_width=rows["state_width"],
            stride=rows["stride"],
            file=rows["file"],
            parts=", ".join(rows["parts"]),
            biases=f"; behind them, float16: {scales}{biases}" if int8 else biases,
            coded=CODED.format(extra=rows["extra"]) if int8 else "",
            dtype=rows["dtype"],
            bytes=rows["width"] * (1 if int8 else 2),
            sums=shared["sums"],
            buckets=paged["buckets"],
            bucket=paged["buckets"][0],
            new_rows=paged["new_rows"],
            cache_rows=paged["cache_rows"],
            last=paged["cache_rows"] - 1,
        )
    return page + TAIL.format(name="OUT")
