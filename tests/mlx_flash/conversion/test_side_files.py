"""Tokenizers are loaded at conversion, templates copied, pointers and leftovers named."""

import json
import shutil
import warnings

import mlx.core as mx
import pytest
from support.checkpoints import edit_config
from support.commands import run_command
from support.tiny import make_checkpoint, write_tokenizer
from transformers import AutoTokenizer

from mlx_flash import load
from mlx_flash.conversion.convert import convert
from mlx_flash.errors import FlashWarning
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.runtime.load import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 17209920\n"
DEFAULT, TOOLS = "{{ messages[0].content }}", "tools {{ tools }}"


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "hf", "llama", layers=2)


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(source, capsys):
    """The line that says why a checkpoint is not converted; nothing is left behind."""
    out = source.with_name("out")
    code, _, err = run_command(capsys, "convert", "--model", source, "--mlx-path", out)
    assert code == 2 and len(err.splitlines()) <= 3
    assert [file.name for file in source.parent.iterdir()] == [source.name]
    return err


def test_no_tokenizer(source, capsys):
    for file in source.glob("tokenizer*"):
        file.unlink()
    assert f"{source} has no tokenizer: expected tokenizer.json" in refused(source, capsys)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    ],
)
def test_pointers_of_git_lfs(name, source, capsys):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(POINTER)
    said = refused(source, capsys)
    assert f"{source / name} is a pointer of Git LFS" in said and "git lfs pull" in said


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("keep", [0, 1, 100, -3])
def test_cut_files(name, keep, source, capsys):
    data = (source / name).read_bytes()
    (source / name).write_bytes(data[:keep])
    assert str(source / name) in refused(source, capsys)


@pytest.mark.parametrize(
    "changes",
    [{"model": {"type": "BPE"}}, {"model": None}, {"decoder": {"type": "None such"}}],
    ids=str,
)
def test_a_tokenizer_that_does_not_load(changes, source, capsys):
    edit_json(source / "tokenizer.json", **changes)
    said = refused(source, capsys)
    assert f"the tokenizer of {source} (tokenizer.json) cannot be loaded" in said
    assert "mlx_flash-" not in said  # the folder in which it was tried


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_beyond_the_embedding(tied, tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", layers=2, tie_word_embeddings=tied)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashWarning)
        convert(source, tmp_path / "as many")
    write_tokenizer(source, 305)
    with pytest.warns(FlashWarning, match=r"has 300 rows, .* 5 tokens beyond them \(300 '<res"):
        convert(source, tmp_path / "more")


def with_folder(source, default):
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    if default:
        (source / "chat_template.jinja").write_text(DEFAULT)


@pytest.mark.parametrize(
    "template",
    [
        lambda source: edit_json(source / "tokenizer_config.json", chat_template=DEFAULT),
        lambda source: edit_json(
            source / "tokenizer_config.json",
            chat_template=[
                {"name": "default", "template": DEFAULT},
                {"name": "tool_use", "template": TOOLS},
            ],
        ),
        lambda source: (source / "chat_template.jinja").write_text(DEFAULT),
        lambda source: with_folder(source, True),
        lambda source: with_folder(source, False),
    ],
    ids=["text", "named", "file", "file and folder", "folder"],
)
def test_templates(template, source, tmp_path):
    """All of them, as transformers finds them in the checkpoint; mlx-lm takes the default."""
    template(source)
    expected = AutoTokenizer.from_pretrained(source)
    out = convert(source, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(out)
    assert found.chat_template == expected.chat_template != None  # noqa: E711
    assert list(ModelDirectory(out).verify()) == []
    tokenizer = load_tokenizer(ModelDirectory(out))
    if "default" in str(found.chat_template) or isinstance(found.chat_template, str):
        text = tokenizer.apply_chat_template([{"role": "user", "content": "sea"}], tokenize=False)
        assert text == "sea"


def test_ends_of_generation_config(source, tmp_path):
    """mlx-lm ends at each of them."""
    (source / "generation_config.json").write_text('{"eos_token_id": [257, 7]}')
    _, tokenizer = load(convert(source, tmp_path / "out"))
    assert tokenizer.eos_token_ids == {257, 7}


def test_reserved_names(source, tmp_path):
    """What calibrate writes is its own, under whatever suffix."""
    names = ("calibration.md", "calibration.json", "experts.json", "predictors.txt")
    for name in names:
        (source / name).write_text("{}")
    directory = ModelDirectory(convert(source, tmp_path / "out"))
    assert not directory.files.keys() & set(names)
    assert not any((directory.path / name).exists() for name in names)
    (directory.path / "calibration.json").write_text('{"new": 1}')
    ModelDirectory(directory.path)


def test_an_index_that_is_left_over(source, tmp_path, capsys):
    """Of shards that are not there it says nothing; beside some that are nobody knows."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    out = convert(source, tmp_path / "out")
    assert (out / "model.safetensors").is_file()
    shutil.rmtree(out)
    shard = str(source / "model-00001-of-00002.safetensors")
    mx.save_safetensors(shard, {"a": mx.zeros((2, 2))})
    assert "not clear which of them are the model" in refused(source, capsys)


@pytest.mark.parametrize(
    "claimed",
    [
        {"group_size": 32, "bits": 8},
        {"group_size": 64, "bits": 4},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 5},
        {"group_size": 48, "bits": 4},
        ...,
    ],
    ids=str,
)
def test_a_quantisation_that_the_tensors_contradict(claimed, source, capsys):
    from mlx_lm import utils

    model, config = utils.load_model(source, lazy=True)
    model, config = utils.quantize_model(model, config, 32, 4)
    (source / "model.safetensors").unlink()
    utils.save_model(source, model)
    utils.save_config(config, source / "config.json")
    for file in source.glob("*.index.json"):
        file.unlink()
    assert convert(source, source.with_name("sound")).is_dir()
    shutil.rmtree(source.with_name("sound"))
    edit_config(source, quantization=claimed, quantization_config=claimed)
    said = refused(source, capsys)
    assert str(source) in said


def test_a_quantisation_of_floats(source, capsys):
    edit_config(source, quantization={"group_size": 32, "bits": 4})
    assert str(source) in refused(source, capsys)
