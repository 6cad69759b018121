"""Models in several GGUF files, as the gguf package's writer splits them."""

import shutil

import mlx.core as mx
import pytest
from fixtures.gguf_files import write_golden

from mlx_flash.conversion.convert import convert
from mlx_flash.conversion.gguf.checkpoint import GGUFCheckpoint
from mlx_flash.errors import DamagedError, ModelError


@pytest.fixture
def shards(tmp_path):
    """Files of at most nine tensors."""
    write_golden(tmp_path / "whole.gguf", "qwen3moe")
    write_golden(tmp_path / "tiny.gguf", "qwen3moe", split_max_tensors=9)
    found = sorted(tmp_path.glob("tiny-*.gguf"))
    assert [file.name for file in found] == [f"tiny-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    return found


def test_shards_are_one_model(shards, tmp_path):
    found, whole = GGUFCheckpoint(shards[0]), GGUFCheckpoint(tmp_path / "whole.gguf")
    assert (found.config, found.shapes) == (whole.config, whole.shapes)
    assert all(mx.array_equal(found.take(name), whole.take(name)) for name in found.shapes)
    one, other = (
        convert(source, tmp_path / name) / "ffn_rows.safetensors"
        for name, source in (("a", shards[0]), ("b", tmp_path / "whole.gguf"))
    )
    assert one.stat().st_size == other.stat().st_size


def test_another_shard_than_the_first(shards):
    with pytest.raises(ModelError, match=r"not the first of 3 shards; give that one, tiny-00001"):
        GGUFCheckpoint(shards[1])


def test_a_shard_that_is_missing(shards):
    shards[1].unlink()
    with pytest.raises(ModelError, match=r"1 of 3 shards are not beside it: tiny-00002-of-00003"):
        GGUFCheckpoint(shards[0])


def test_shards_under_other_names(shards, tmp_path):
    path = shutil.copy(shards[0], tmp_path / "model.gguf")
    with pytest.raises(ModelError, match=r"one of 3 shards, but its name is not like NAME-00001"):
        GGUFCheckpoint(path)


def test_shards_that_are_mixed_up(shards):
    shutil.copy(shards[2], shards[1])
    with pytest.raises(DamagedError, match=r"00002-of-00003\.gguf: says that it is shard 2 of 3"):
        GGUFCheckpoint(shards[0])


def test_a_shard_that_is_cut(shards):
    content = shards[2].read_bytes()
    shards[2].write_bytes(content[:-100])
    with pytest.raises(DamagedError, match=r"tiny-00003-of-00003\.gguf: truncated: tensor"):
        GGUFCheckpoint(shards[0])


def test_a_shard_of_another_model(shards, tmp_path):
    write_golden(tmp_path / "other.gguf", "qwen2", split_max_tensors=9)
    others = sorted(tmp_path.glob("other-*-of-*.gguf"))
    shutil.copy(others[-1], shards[-1])
    with pytest.raises((ModelError, DamagedError)):
        GGUFCheckpoint(shards[0])


def test_fingerprints_tell_shards_apart(shards):
    first = GGUFCheckpoint(shards[0]).fingerprint
    shards[2].touch()
    assert GGUFCheckpoint(shards[0]).fingerprint != first
