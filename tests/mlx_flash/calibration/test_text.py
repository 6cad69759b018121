"""The calibration text: found, checked, cut up."""

import gzip
import json
import sys

import numpy as np
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from mlx_flash.calibration import text as texts
from mlx_flash.errors import CalibrationError

WORDS = "the brown fox and the other hound ran over the hill in the morning "


class Letters:
    """A tokenizer of bytes."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def encode(self, text, add_special_tokens=True, **_):
        first = [self.bos_token_id] if add_special_tokens and self.bos_token_id else []
        return first + list(text.encode())


def load(data=None, tokens=2048, bos=None, positions=None, seed=0):
    return texts.load(data, Letters(bos), tokens, positions, seed)


def test_parts_are_apart_and_in_order():
    text = load(tokens=4096)
    assert [len(part) * 512 for part in text.parts().values()] == [4096, 512, 1024]
    flat = [tuple(sequence) for part in text.parts().values() for sequence in part]
    assert len(set(flat)) == len(flat)
    whole = texts.DEFAULT.read_text()
    places = [whole.find(bytes(list(sequence)).decode()) for sequence in flat]
    assert -1 not in places
    assert places == sorted(places)


def test_the_seed_picks_the_training_part():
    one, same, other = load(), load(), load(seed=1)
    assert one.sha256 == same.sha256 != other.sha256
    assert (one.held_out == other.held_out).all()


def test_sequences_begin_as_the_models_texts_do():
    text = load(bos=7, positions=128)
    assert text.length == 128
    assert all((part[:, 0] == 7).all() for part in text.parts().values())
    assert load().train[0, 0] != 7


def test_a_short_text_gives_what_it_has(tmp_path):
    file = tmp_path / "short.txt"
    file.write_text((WORDS * 100)[:3000])
    text = load(file, tokens=16384)
    sizes = {name: part.size for name, part in text.parts().items()}
    assert 2200 < sizes["train"] < 2600
    assert min(sizes.values()) > 150
    assert sum(sizes.values()) > 2800
    assert text.describe()["train_tokens"] == sizes["train"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"too short", "has 9 tokens .* at least 2048.* longer --data"),
        ("a.txt", WORDS.encode() * 90 + b"\0", "binary"),
        ("a.txt", WORDS.encode() * 90 + b"\xff\xfe", "not text in UTF-8 .*0xff"),
        ("a.txt.gz", b"not gzip", "cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(WORDS.encode() * 90, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"words": "a"}\n', "without a text"),
        ("a.json", b"[1, 2]", "without a text"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / name)


def test_other_files_hold_texts_too(tmp_path):
    lines = [WORDS * 20] * 6
    records = [{"text": line, "id": i} for i, line in enumerate(lines)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_text(json.dumps(lines))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as f:
        f.write("\n".join(map(json.dumps, records)))
    found = {load(file).sha256 for file in sorted(tmp_path.iterdir())}
    assert len(found) == 1


def test_only_as_much_as_is_wanted_is_read(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": WORDS * 100})] * 200 + ["this is never looked at"]
    file.write_text("\n".join(lines))
    text, _ = texts.read(file, 50_000)
    assert 50_000 <= len(text) < 60_000


def test_places_that_hold_no_text(tmp_path):
    with pytest.raises(CalibrationError, match="is a directory"):
        load(tmp_path)
    with pytest.raises(CalibrationError, match=r"there is no file .*owner/name"):
        load(tmp_path / "nothing.txt")
    with pytest.raises(CalibrationError, match="expected at least 1024"):
        load(tokens=10)


def test_parquet_needs_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match="pip install pyarrow"):
        load(tmp_path / "a.parquet")


class Hub:
    """What ``huggingface_hub`` would do."""

    def __init__(self, tmp_path, files):
        self.path, self.files, self.asked = tmp_path, files, None

    def list_repo_files(self, repo, repo_type):
        assert (repo, repo_type) == ("owner/name", "dataset")
        return self.files

    def download(self, repo, file, repo_type):
        self.asked = file
        (self.path / "cached.txt").write_text(WORDS * 90)
        return str(self.path / "cached.txt")


@pytest.mark.parametrize(
    ("name", "asked"), [("owner/name", "en/train.txt"), ("owner/name:x/b.txt", "x/b.txt")]
)
def test_data_sets_on_the_hub(tmp_path, monkeypatch, name, asked):
    hub = Hub(tmp_path, ["README.md", "a.parquet", "en/test.txt", "en/train.txt"])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    assert load(name).source == name
    assert hub.asked == asked


class Foreign(Exception):
    """An error of the HTTP library below the hub's, which is no OSError."""


@pytest.mark.parametrize("error", [OfflineModeIsEnabled, Foreign])
def test_data_sets_that_cannot_be_had(tmp_path, monkeypatch, error):
    hub = Hub(tmp_path, ["README.md", "a.zip"])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    with pytest.raises(CalibrationError, match=r"has no text files .*a.zip"):
        load("owner/name")

    def offline(*_args, **_other):
        raise error("offline mode is enabled")

    monkeypatch.setattr(hub, "list_repo_files", offline)
    with pytest.raises(
        CalibrationError, match=r"no file owner/name.*offline mode.*local text file"
    ):
        load("owner/name")


def test_the_default_text_is_there():
    text = texts.DEFAULT.read_text(encoding="utf-8")
    assert text.startswith("Persuasion")
    assert np.array(list(text[:1000].encode())).max() < 128
