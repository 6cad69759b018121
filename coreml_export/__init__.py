"""Core ML packages of mlx_flash's models, for offline apps, proven on any machine.

errors.py        what an export can refuse
source.py        model directory, Hugging Face directory, GGUF -> named tensors, one at a time
description.py   what a decoder is made of
architecture.py  families -> that description
rotary.py        tables of cosines and sines from MLX's own RoPE
quantize.py      int8, int4 and palettes; back into floats
compensation.py  codes whose errors make up for each other
calibration.py   those of a whole model, found on text
recipes.py       which tensor is stored in how many bits
weights.py       tensors on their way into programs, shared between functions
mil.py           coremltools, imported quietly
parts.py         norm, attention, FFN, head in MIL
decoder.py       functions decode and prefill, cut into packages
paged.py         attention per layer, FFN over given and over cached rows, head
predictor.py     which rows, as functions
package.py       program -> .mlpackage, the same bytes every time
manifest.py      manifest.json, hashes
readme.py        README.md of an export, with the calls in Swift
tokenizer.py     tokenizer.json, whatever the model came with
export.py        all of it, into one directory
kernels.py       MIL operations in numpy
interpreter.py   runs a saved package with them
runner.py        dense packages, as an app would run them
host.py          paged packages, rows and slots, as an app would run them
device.py        Core ML's own prediction (macOS)
measures.py      how far two sets of logits lie apart
parity.py        gates and report
verify.py        which runs make a report
cli.py           the command line
"""
