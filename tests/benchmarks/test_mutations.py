"""Mutations of tiny models, six of each kind: nothing but FlashErrors, no hang, little memory."""

import json
import random

import pytest

from benchmarks.robustness import mutations, mutators


@pytest.mark.deeper
def test_mutations_end_in_one_line(request):
    whole = request.config.getoption("--whole")
    found = mutations.run(1000 if whole else 48, seed=7, seconds=120, memory=1_500_000_000)
    assert not found["bad"]
    assert found["refused"] + found["ran"] == found["mutations"]
    assert found["refused"] > found["mutations"] // 3  # most changes are noticed


@pytest.mark.parametrize("suffix", [".json", ".safetensors", ".gguf"])
def test_a_seed_makes_the_same_change(tmp_path, suffix):
    text = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}})
    raw = text.encode()
    if suffix == ".safetensors":
        raw = len(raw).to_bytes(8, "little") + raw + b"abcd"
    made = set()
    for seed in (*range(20), *range(20)):
        file = tmp_path / f"file{suffix}"
        file.write_bytes(raw)
        mutators.mutate(file, random.Random(seed))
        made.add((seed, file.read_bytes()))
    assert len(made) == 20
    assert len({content for _, content in made} - {raw}) > 15
