"""Files made to harm: refused in one clear error, in time and memory in proportion to the file."""

import contextlib
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
from fixtures.gguf_files import ARCHS, converted, golden, metadata, vocabulary, write, write_golden

from mlx_flash.conversion.gguf import header
from mlx_flash.conversion.gguf.architectures import find_architecture
from mlx_flash.conversion.gguf.checkpoint import GGUFCheckpoint, find_model
from mlx_flash.errors import DamagedError, FlashError, ModelError

U8, I32, F32, STRING, ARRAY = 0, 5, 6, 8, 9


def text(value):
    return struct.pack("<Q", len(value)) + value


def array(kind, count, data):
    return struct.pack("<IIQ", ARRAY, kind, count) + data


def file(path, *pairs, tensors=0, table=b""):
    """A header of keys whose values are given in bytes."""
    keys = [text(b"general.architecture") + struct.pack("<I", STRING) + text(b"llama")]
    keys += [text(key.encode()) + value for key, value in pairs]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, len(keys)) + b"".join(keys) + table)
    return path


def opened(path):
    """(error, seconds of the processor, bytes of Python's memory) of opening a file."""
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FlashError) as caught:
        GGUFCheckpoint(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 700
    return caught.value, seconds, peak


@pytest.mark.parametrize(
    ("value", "factor"),
    [
        pytest.param(array(U8, 4 << 20, bytes(4 << 20)), 12, id="bytes"),
        pytest.param(array(STRING, 20_000, text(b"xy") * 20_000), 12, id="texts"),
        pytest.param(array(ARRAY, 20_000, struct.pack("<IQ", U8, 0) * 20_000), 12, id="lists"),
    ],
)
def test_arrays_take_what_their_bytes_take(tmp_path, value, factor):
    error, seconds, peak = opened(file(tmp_path / "x.gguf", ("x", value)))
    assert "tokenizer kind None" in str(error)
    assert seconds < 5 and peak < factor * len(value) + (8 << 20)


def test_a_long_header_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "HEADER_BYTES", 1 << 20)
    path = file(tmp_path / "x.gguf", ("x", array(U8, 8 << 20, bytes(8 << 20))))
    error, _, peak = opened(path)
    assert "expected at most 1048576" in str(error) and peak < 4 << 20


def test_deep_nesting(tmp_path):
    nested = struct.pack("<IQ", ARRAY, 1) * 5000 + struct.pack("<IQ", U8, 1) + b"\0"
    error, _, _ = opened(file(tmp_path / "x.gguf", ("x", struct.pack("<I", ARRAY) + nested)))
    assert "nested more than 8 deep" in str(error) and isinstance(error, DamagedError)


COUNTS = {
    "text": struct.pack("<IQ", STRING, 2**63),
    "array": array(I32, 2**62, b""),
    "array of texts": array(STRING, 2**64 - 1, b""),
    "array of arrays": array(ARRAY, 2**64 - 1, b""),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_beyond_the_file(tmp_path, name):
    error, seconds, peak = opened(file(tmp_path / "x.gguf", ("x", COUNTS[name])))
    assert "truncated inside the header" in str(error) and seconds < 2 and peak < 4 << 20


def test_tables_beyond_the_file(tmp_path):
    error, seconds, _ = opened(file(tmp_path / "x.gguf", tensors=2**63))
    assert "truncated inside the header" in str(error) and seconds < 2


ODD_KEYS = {
    "twice": ([("x", b"\0\0\0\0\1"), ("x", b"\0\0\0\0\2")], "key 'x' occurs twice"),
    "type": ([("x", struct.pack("<I", 77))], "a value is of type 77"),
    "alignment": ([("general.alignment", struct.pack("<II", 4, 24))], "alignment is 24"),
    "alignment 0": ([("general.alignment", struct.pack("<II", 4, 0))], "alignment is 0"),
    "no text": ([("x", struct.pack("<I", STRING) + text(b"\xff\xfe"))], "unreadable GGUF header"),
}


@pytest.mark.parametrize("name", ODD_KEYS)
def test_keys_against_the_format(tmp_path, name):
    pairs, message = ODD_KEYS[name]
    error, _, _ = opened(file(tmp_path / "x.gguf", *pairs))
    assert message in str(error) and isinstance(error, DamagedError)


# ---------------------------------------------------------------- where tensors lie


@pytest.fixture
def sound(tmp_path):
    write_golden(path := tmp_path / "tiny.gguf", "qwen3")
    return path


def shifted(path, name, by, of=None):
    """The file with a tensor's offset moved by so much, or to another's."""
    content = bytearray(path.read_bytes())

    def at(tensor):
        start = content.index(text(tensor.encode())) + 8 + len(tensor)
        dimensions = struct.unpack_from("<I", content, start)[0]
        return start + 4 + 8 * dimensions + 4

    offset = struct.unpack_from("<Q", content, at(of or name))[0]
    struct.pack_into("<Q", content, at(name), offset + by)
    path.write_bytes(content)
    return path


def test_tensors_that_overlap(sound):
    GGUFCheckpoint(sound)
    path = shifted(sound, "blk.1.attn_q.weight", 0, of="blk.1.attn_output.weight")
    with pytest.raises(DamagedError, match=r"begins at byte \d+, inside blk\.1\.attn_"):
        GGUFCheckpoint(path)


def test_tensors_that_are_not_aligned(sound):
    with pytest.raises(DamagedError, match=r"blk\.0\.attn_q\.weight begins at .*a multiple of 32"):
        GGUFCheckpoint(shifted(sound, "blk.0.attn_q.weight", 4))


def test_tensors_beyond_the_file(sound):
    with pytest.raises(DamagedError, match=r"truncated: tensor blk\.0\.attn_q\.weight ends at"):
        GGUFCheckpoint(shifted(sound, "blk.0.attn_q.weight", 1 << 40))


def test_layers_are_compared_with_the_file_before_a_model_is_made(tmp_path):
    case = golden("qwen3")
    meta = {f"qwen3.{k}": v for k, v in metadata(case.config).items()} | vocabulary(64)
    meta["qwen3.block_count"] = 300_000
    path = write(tmp_path / "x.gguf", "qwen3", meta, converted(case.config, case.weights))
    error, seconds, peak = opened(path)
    assert "300000 layers; missing: blk.2." in str(error)
    assert seconds < 5 and peak < 64 << 20


def test_widths_are_compared_with_the_file_before_a_model_is_made(tmp_path):
    """Heads have norms of their own here: half a billion of them would be made."""
    case = golden("stablelm-12b")
    keys = metadata(case.config) | {"embedding_length": 2**32 - 2, "rope.dimension_count": 2}
    keys |= {"attention.head_count": 2**31 - 1, "attention.head_count_kv": 2**31 - 1}
    meta = {f"stablelm.{k}": v for k, v in keys.items()} | vocabulary(64)
    path = write(tmp_path / "x.gguf", "stablelm", meta, converted(case.config, case.weights))
    error, seconds, peak = opened(path)
    assert "token_embd.weight (64, 32), expected rows of 4294967294" in str(error)
    assert seconds < 5 and peak < 64 << 20


# ---------------------------------------------------------------- files that are no model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("adapter", "a LoRA adapter, which changes a model but is none"),
        ("mmproj", "the vision or audio part of a model"),
        ("vocab", "a vocabulary without a model"),
        ("imatrix", "an importance matrix"),
        ("poem", "of a kind that is not known"),
    ],
)
def test_files_that_are_no_model(tmp_path, kind, message):
    path = write(
        tmp_path / "x.gguf",
        "llama",
        {"general.type": kind},
        {"blk.0.attn_q.weight.lora_a": np.ones((8, 4), np.float32)},
    )
    with pytest.raises(ModelError, match=rf"x\.gguf: general.type is '{kind}': {message}"):
        GGUFCheckpoint(path)


def test_a_projector_without_a_type(tmp_path):
    path = write(tmp_path / "x.gguf", "clip", {}, {"v.patch_embd.weight": np.ones((2, 2), "f4")})
    with pytest.raises(ModelError, match="architecture 'clip' is the vision or audio part"):
        GGUFCheckpoint(path)


# ---------------------------------------------------------------- anything


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "phi3-longrope"])
def test_changed_bytes_are_told_or_harmless(tmp_path, name):
    path = tmp_path / "x.gguf"
    write_golden(path, name)
    content = path.read_bytes()
    first = header.read_header(path, len(content)).tensors[0].offset
    rng = random.Random(name)
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(4, first)] = rng.choice((0, 1, 255, rng.randrange(256)))
        path.write_bytes(changed)
        with contextlib.suppress(FlashError):
            GGUFCheckpoint(path)


WRONG = [0, -1, 2**31, True, "two", 1e30, float("nan"), [1, 2], [], [[1]], "x" * 100_000]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss", "phi3-longrope", "qwen2moe"])
def test_values_of_the_wrong_kind(tmp_path, name):
    """Every key in turn gets values that it cannot have."""
    case = golden(name)
    arch = ARCHS[case.config["model_type"]]
    meta = {f"{arch}.{k}": v for k, v in metadata(case.config).items()} | vocabulary(64)
    tensors = converted(case.config, case.weights)
    path = write(tmp_path / "x.gguf", arch, meta, tensors)
    source = header.read_header(path, path.stat().st_size)
    by_name = {tensor.name: tensor for tensor in source.tensors}
    rng = random.Random(name)
    for key in meta:
        for value in rng.sample(WRONG, 4):
            changed = source.meta | {key: value}
            with contextlib.suppress(FlashError):
                find_model(*find_architecture(changed), changed, by_name)
