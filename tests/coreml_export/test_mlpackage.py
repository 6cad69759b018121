"""Packages: the same as coremltools' own, but for what differs from run to run."""

from support.coreml_tools import CONTEXT, FIXTURES

from coreml_export.bundle import mlpackage
from coreml_export.program import dense
from coreml_export.program.coremltools_compat import TARGETS, ct, fresh_names
from coreml_export.program.weights import Weights
from coreml_export.quantization.stored_weights import RoundedWeights
from coreml_export.source.families import describe
from coreml_export.source.weights_source import Source


def test_a_package_is_what_coremltools_converts(tmp_path):
    source = Source(FIXTURES / "opt-austen")
    decoder = describe(source)
    part = dense.Part("decoder", tuple(range(len(decoder.layers))), True, True)

    def program():
        stored = RoundedWeights(source, decoder, [("*", "int8")])
        return dense.program(dense.functions(decoder, Weights(stored), part, CONTEXT))

    with fresh_names():
        mlpackage.build(program(), tmp_path / "ours.mlpackage", {"flash.part": "decoder"})
    with fresh_names():
        theirs = ct.convert(
            program(),
            convert_to="mlprogram",
            minimum_deployment_target=TARGETS["iOS18"],
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    theirs.user_defined_metadata.pop("com.github.apple.coremltools.conversion_date")
    theirs.user_defined_metadata["flash.part"] = "decoder"
    theirs.save(str(tmp_path / "theirs.mlpackage"))
    ours, theirs = (mlpackage.load(tmp_path / f"{name}.mlpackage") for name in ("ours", "theirs"))
    assert ours.get_spec() == theirs.get_spec()
    found = [
        (tmp_path / f"{name}.mlpackage/Data" / mlpackage.WEIGHTS / "weight.bin").read_bytes()
        for name in ("ours", "theirs")
    ]
    assert found[0] == found[1]
