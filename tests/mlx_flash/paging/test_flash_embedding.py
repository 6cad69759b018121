"""The embedding on flash: the same rows, less memory, clear errors."""

from __future__ import annotations

import gc
import os

import mlx.core as mx
import numpy as np
import pytest
from support.parity import greedy, logits
from support.tiny import VOCAB, make_checkpoint

from mlx_flash.conversion.convert import convert
from mlx_flash.errors import DamagedError, ModelError, ReadError
from mlx_flash.model_directory.directory import ModelDirectory
from mlx_flash.paging import flash_embedding
from mlx_flash.runtime.load import load_model
from mlx_flash.runtime.memory_plan import plan_for
from mlx_flash.runtime.memory_requirements import memory_requirements
from mlx_flash.runtime.options import PagingOptions
from mlx_flash.storage.reader import RowReader

UNTIED = ("llama", "phi", "qwen2")


def directory_of(tmp_path, family="llama", dtype="float32", **config):
    source = make_checkpoint(tmp_path / "hf", family, dtype, **config)
    return ModelDirectory(convert(str(source), tmp_path / "flash"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("family", UNTIED)
def test_same_as_in_memory(tmp_path, family, dtype):
    directory = directory_of(tmp_path, family, dtype)
    table = flash_embedding.find(directory)
    assert table is not None and table.shape[0] == VOCAB
    dense = load_model(directory, PagingOptions(use_flash=False))
    weight = dense.model.embed_tokens.weight
    found = flash_embedding.FlashEmbedding(table)
    for tokens in (mx.arange(VOCAB), mx.array([[5, 5, 0], [VOCAB - 1, 7, 5]]), mx.array([-1])):
        rows = found(tokens)
        assert rows.dtype == weight.dtype and rows.shape == (*tokens.shape, weight.shape[1])
        assert mx.array_equal(rows, weight[tokens])
    found.close()


def test_a_paged_model_leaves_it_on_flash(tmp_path):
    directory = directory_of(tmp_path)
    dense = load_model(directory, PagingOptions(use_flash=False))
    paged = load_model(directory, PagingOptions(kept_share=0.5))
    assert type(paged.model.embed_tokens) is flash_embedding.FlashEmbedding
    assert not any("embed_tokens" in name for name in _names(paged))
    assert mx.array_equal(logits(paged), logits(dense))
    assert greedy(paged, 96) == greedy(dense, 96)
    kept = load_model(directory, PagingOptions(kept_share=1.0))
    assert type(kept.model.embed_tokens) is not flash_embedding.FlashEmbedding
    paged.flash.close()
    with pytest.raises((ReadError, ValueError)):
        paged.model.embed_tokens(mx.array([1]))


def _names(model):
    from mlx.utils import tree_flatten

    return [name for name, _ in tree_flatten(model.parameters())]


@pytest.mark.parametrize("family", ["gemma2", "cohere", "opt", "gpt2"])
def test_tied_and_oddly_named_ones_stay(tmp_path, family):
    assert flash_embedding.find(directory_of(tmp_path, family)) is None


def test_a_packed_one_stays(tmp_path):
    source = make_checkpoint(tmp_path / "hf", "llama", "float32")
    path = convert(str(source), tmp_path / "flash", quantize=True, q_group_size=32)
    assert flash_embedding.find(ModelDirectory(path)) is None


def test_the_budget_counts_it_only_where_it_is_held(tmp_path):
    directory = directory_of(tmp_path)
    reader = RowReader(directory.rows)
    needs = memory_requirements(directory, reader, PagingOptions(context=64))
    reader.close()
    assert needs.lookup == flash_embedding.find(directory).nbytes
    streamed, held = (
        plan_for(needs, PagingOptions(kept_share=share), 1 << 40) for share in (0.5, 1.0)
    )
    assert streamed.lookup and not held.lookup
    assert held.bytes_of("resident") - streamed.bytes_of("resident") == needs.lookup


def test_tokens_outside_the_embedding(tmp_path):
    found = flash_embedding.FlashEmbedding(flash_embedding.find(directory_of(tmp_path)))
    with pytest.raises(ModelError, match=f"token {VOCAB} is outside .* has {VOCAB} tokens"):
        found(mx.array([VOCAB]))


def test_a_cut_file_and_a_failing_disk(tmp_path, monkeypatch):
    directory = directory_of(tmp_path)
    table = flash_embedding.find(directory)
    found = flash_embedding.FlashEmbedding(table)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(ReadError, match="the embedding at offset"):
            found(mx.array([3]))
    os.truncate(table.path, table.offset + 10)
    with pytest.raises(DamagedError, match="cut while in use"):
        found(mx.array([3]))


def test_short_reads_are_continued(tmp_path, monkeypatch):
    table = flash_embedding.find(directory_of(tmp_path))
    found = flash_embedding.FlashEmbedding(table)
    expected = np.array(found(mx.array([9])))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: real(fd, min(size, 7), at))
    np.testing.assert_array_equal(np.array(found(mx.array([9]))), expected)


@pytest.mark.parametrize("damage", ["header", "entry"])
def test_a_damaged_header(tmp_path, damage):
    table = flash_embedding.find(directory := directory_of(tmp_path))
    content = table.path.read_bytes()
    if damage == "header":
        table.path.write_bytes(content[:8] + b"#" + content[9:])
    else:
        table.path.write_bytes(content.replace(b'"data_offsets"', b'"data_offsetz"'))
    with pytest.raises(DamagedError, match="convert the model again"):
        flash_embedding.find(directory)


def test_a_model_that_is_dropped_lets_go_of_the_file(tmp_path):
    found = flash_embedding.FlashEmbedding(flash_embedding.find(directory_of(tmp_path)))
    number = found._file
    os.fstat(number)
    del found
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(number)
