"""Headers of GGUF files: what was written comes back, and damage is told as damage."""

import contextlib

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.conversion.gguf.header import check_extents, check_file, check_types, read_header
from mlx_flash.errors import DamagedError, FlashError

INT32 = st.integers(-(2**31), 2**31 - 1)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
METADATA = st.dictionaries(
    WORDS.filter(lambda key: key.split(".")[0] not in ("", "GGUF", "general", "split")),
    st.one_of(
        st.booleans(),
        INT32,
        WORDS.filter(bool),  # the library leaves empty ones out
        st.lists(INT32, min_size=1, max_size=5),
        st.lists(WORDS, min_size=1, max_size=5),
    ),
    max_size=5,
)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
ADD = {bool: GGUFWriter.add_bool, int: GGUFWriter.add_int32, str: GGUFWriter.add_string}


def write(path, metadata, shapes):
    """A file of float32 tensors that hold their own number."""
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        ADD.get(type(value), GGUFWriter.add_array)(writer, key, value)
    for n, shape in enumerate(shapes):
        writer.add_tensor(f"tensor {n}", np.full(shape, n, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    """What a conversion looks at before it takes any tensor."""
    size = check_file(path).st_size
    header = read_header(path, size)
    check_types(header.tensors)
    check_extents(header.tensors, size, header.alignment)
    return header.meta, header.tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("headers")


@given(metadata=METADATA, shapes=st.lists(SHAPES, min_size=1, max_size=3))
def test_what_was_written_comes_back(folder, metadata, shapes):
    path = write(folder / "whole.gguf", metadata, shapes)
    found, tensors = read(path)
    assert {key: found[key] for key in metadata} == metadata
    assert [t.name for t in tensors] == [f"tensor {n}" for n in range(len(shapes))]
    assert [t.shape for t in tensors] == shapes
    content = path.read_bytes()
    for n, tensor in enumerate(tensors):
        values = np.frombuffer(content[tensor.offset : tensor.end], np.float32)
        assert values.size == np.prod(tensor.shape) and (values == n).all()


@pytest.fixture(scope="module")
def sound(folder):
    """The bytes of a file, where its header ends, where its last tensor does."""
    metadata = {"a.count": 3, "a.name": "tiny", "a.words": ["x", "yy"], "a.ids": [1, 2]}
    path = write(folder / "sound.gguf", metadata, [(2, 32), (4,)])
    first, last = read(path)[1]
    return path.read_bytes(), first.offset, last.end


@given(
    places=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4),
    size=st.none() | st.integers(0),
)
def test_damage_is_told(folder, sound, places, size):
    """Whatever the bytes of the header: it reads, or it is one of our errors."""
    content, header, _ = sound
    damaged = bytearray(content)
    for place, value in places:
        damaged[place % header] = value
    path = folder / "damaged.gguf"
    path.write_bytes(damaged if size is None else damaged[: size % len(content)])
    with contextlib.suppress(FlashError):
        read(path)


def test_a_tensor_without_dimensions(folder, sound):
    name, one, four = b"tensor 1", (1).to_bytes(4, "little"), (4).to_bytes(8, "little")
    assert name + one + four in sound[0]
    path = folder / "point.gguf"
    path.write_bytes(sound[0].replace(name + one + four, name + bytes(4)))
    with pytest.raises(DamagedError, match="tensor 1' has 0 dimensions"):
        read(path)


@given(data=st.data())
def test_a_file_that_ends_early_is_refused(folder, sound, data):
    content, _, end = sound
    path = folder / "cut.gguf"
    path.write_bytes(content[: data.draw(st.integers(0, end - 1), label="size")])
    with pytest.raises(FlashError):
        read(path)
