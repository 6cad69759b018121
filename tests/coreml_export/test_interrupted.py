"""What a killed export leaves is cleared by the next one; what others made is not."""

import pytest
from support.coreml_tools import checkpoint, make

from coreml_export.bundle import manifest
from coreml_export.errors import ExportError
from coreml_export.export import export


def test_a_killed_export_is_begun_anew(tmp_path):
    model, out = checkpoint(tmp_path / "model", "llama"), tmp_path / "out"
    left = tmp_path / "out.partial"
    (left / "dense.mlpackage" / "Data").mkdir(parents=True)
    (left / "embedding.bin").write_bytes(b"half")
    (left / manifest.MARKER).write_text("coreml_export")
    make(model, out)
    manifest.verify(out, manifest.read(out))
    assert not left.exists()
    assert not (out / manifest.MARKER).exists() and not (out / "embedding.bin").exists()


def test_a_folder_of_others_stays(tmp_path):
    model = checkpoint(tmp_path / "model", "llama")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine")
    with pytest.raises(ExportError, match="in the way and not made by"):
        export(model, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"
