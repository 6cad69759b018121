"""What an export takes from files beside the weights: templates, the number of positions."""

import json

import pytest
from support.coreml_tools import checkpoint, make, settings
from support.tiny import make_checkpoint

from coreml_export import export as export_module
from coreml_export.bundle import manifest
from coreml_export.errors import ExportError
from coreml_export.source import tokenizer
from coreml_export.source.weights_source import chat_template

DEFAULT, TOOLS = "{{ messages[0].content }}", "{{ tools }}"
NAMED = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": DEFAULT}]


def with_template(model, template):
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))


def test_templates_by_name(tmp_path):
    """The manifest has the default one; all of them stay in the tokenizer's files."""
    model = checkpoint(tmp_path / "model")
    with_template(model, NAMED)
    (model / "generation_config.json").write_text('{"eos_token_id": [257, 7]}')
    out = make(model, tmp_path / "out", context=64)
    assert manifest.read(out)["eos"] == [257, 7]
    assert manifest.read(out)["chat_template"] == DEFAULT
    kept = json.loads((out / "tokenizer/tokenizer_config.json").read_text())
    assert kept["chat_template"] == NAMED


def test_ends(tmp_path):
    assert tokenizer.ends(tmp_path, {}) == []
    assert tokenizer.ends(tmp_path, {"eos_token_id": 5}) == [5]
    for text, found in (('{"eos_token_id": 7}', [7]), ("{}", [5]), ("[]", [5]), ("no", [5])):
        (tmp_path / "generation_config.json").write_text(text)
        assert tokenizer.ends(tmp_path, {"eos_token_id": 5}) == found


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (DEFAULT, DEFAULT),
        (NAMED, DEFAULT),
        (NAMED[:1], None),
        ([DEFAULT, {"name": "default"}], None),
        (None, None),
        (5, None),
    ],
)
def test_kinds_of_templates(template, found, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert chat_template(tmp_path) == found
    (tmp_path / "chat_template.jinja").write_text(TOOLS)
    assert chat_template(tmp_path) == TOOLS


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [(None, 128), ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256)],
)
def test_a_context_beyond_the_positions(scaling, limit, tmp_path, monkeypatch):
    """Refused before anything is written; what the rope reaches is allowed."""
    model = make_checkpoint(
        tmp_path / "model", layers=2, max_position_embeddings=128, rope_scaling=scaling
    )
    with pytest.raises(ExportError, match=f"{limit + 64} tokens, but .* {limit} positions"):
        make(model, tmp_path / "out", context=limit + 64)
    assert not (tmp_path / "out").exists()

    def reached(self, *_):
        raise ExportError(f"with {self.settings.context}")

    monkeypatch.setattr(export_module._Job, "run", reached)
    with pytest.raises(ExportError, match=f"with {limit}"):
        make(model, tmp_path / "out", context=limit)
    with pytest.raises(ExportError, match=f"with {limit}"):
        export_module.export(model, tmp_path / "out", settings(context=None))
