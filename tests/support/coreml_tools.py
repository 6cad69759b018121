"""Exports for the tests of coreml_export, and ways to damage them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from coremltools.proto import Model_pb2
from support import tiny

from coreml_export.bundle import manifest
from coreml_export.bundle.mlpackage import SPEC
from coreml_export.export import export
from coreml_export.quantization.stored_weights import RoundedWeights
from coreml_export.settings import Settings
from coreml_export.source.families import describe
from coreml_export.source.weights_source import Source
from coreml_export.verification import verify

CONTEXT = 128
FIXTURES = Path(__file__).parents[1] / "fixtures"


def checkpoint(path, model_type="llama", **other):
    """A tiny random model, so narrow that a test takes seconds."""
    return tiny.make_checkpoint(path, model_type, **{"layers": 2} | other)


def settings(**other):
    return Settings.of(**{"context": CONTEXT} | other)


def make(model, out, **other):
    return export(model, out, settings(**other))


def report(model, out, **other):
    """Measure an export against the model it is from."""
    source = Source(model)
    chosen = settings(**other)
    content = manifest.read(out)
    chosen = replace(chosen, profiles=tuple(p for p in ("dense", "paged") if p in content))
    decoder = describe(source)
    stored = RoundedWeights(source, decoder, chosen.recipe)
    return verify.measure(out, content, source, decoder, chosen, stored)


def measured(model, out, **other):
    """Export and measure on the way, as --verify does, whatever the report says."""
    reports = []
    chosen = settings(**other)
    export(model, out, chosen, lambda *given: reports.append(verify.measure(*given)))
    return reports[0]


def edited(out, copy, change, package="decoder"):
    """A copy of an export with a package's spec changed."""
    shutil.copytree(out, copy)
    file = copy / f"{package}.mlpackage" / "Data" / SPEC
    spec = Model_pb2.Model()
    spec.ParseFromString(file.read_bytes())
    change(spec)
    file.write_bytes(spec.SerializeToString())
    return copy


def operations(spec, function):
    """The operations of one function of a spec."""
    blocks = spec.mlProgram.functions[function].block_specializations
    return next(iter(blocks.values())).operations
