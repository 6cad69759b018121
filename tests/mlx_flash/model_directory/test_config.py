"""config.json: what is written is read, and nothing in it ends in an error that is not ours."""

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import config as tiny_config

from mlx_flash.errors import FlashError, ModelError
from mlx_flash.model_directory.config import config_sha256, locate_ffn, read_config, write_config

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers() | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(WORDS, JSON, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


def same(a, b):
    """Equal, with NaN equal to itself and 1 unlike 1.0 and True."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


@given(config=OBJECTS)
def test_what_is_written_is_read(folder, config):
    """Infinities and NaN among it, which JSON has no word for."""
    write_config(folder / "config.json", config)
    assert same(read_config(folder), config)


@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_content_is_an_object_or_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    try:
        assert isinstance(read_config(folder), dict)
    except ModelError as error:
        assert str(folder / "config.json") in str(error)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000])
def test_what_json_itself_gives_up_on(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json (is not JSON|holds)"):
        read_config(folder)


KEYS = sorted(tiny_config("llama"))


@given(
    model_type=st.sampled_from(["llama", "opt", "gemma3_text", "mixtral", "nonsense"]) | JSON,
    changes=st.dictionaries(st.sampled_from(KEYS) | WORDS, JSON, max_size=3),
    nested=st.booleans(),
)
def test_the_ffn_is_found_or_refused(folder, model_type, changes, nested):
    """Of a config with any values in any place, and of one that lies in text_config."""
    config = tiny_config("llama") | changes | {"model_type": model_type}
    if nested:
        config = {"model_type": model_type, "text_config": config}
    with contextlib.suppress(FlashError):
        ffn, mixture = locate_ffn(config, folder)
        assert (ffn is None) != (mixture is None)


@given(config=OBJECTS, flash=OBJECTS)
def test_the_hash_leaves_out_its_own_place(config, flash):
    whole = config | {"flash": flash}
    found = config_sha256(whole)
    assert found == config_sha256(config | {"flash": flash | {"config_sha256": found}})
    assert found != config_sha256(whole | {"one more key": 1})
    assert found != config_sha256(config | {"flash": flash | {"one more key": 1}})
