"""Recordings of a text: what is damaged or lost is recorded again, with a word."""

from __future__ import annotations

import sys
import warnings

import mlx.core as mx
import numpy as np
import pytest
from support.disks import PowerLoss

from mlx_flash import cli
from mlx_flash.calibration import recordings
from mlx_flash.calibration.experts import trace
from mlx_flash.calibration.probes import Seen
from mlx_flash.calibration.recordings import SQUARES, STATE, Part, Recorder
from mlx_flash.errors import FlashWarning

LAYERS, ROWS, WIDTH, TOKENS = 2, 24, 8, 6
RECORDS = {"train": ("x", "active", SQUARES), "validation": ("x", "gate", "h")}
TEXT = ["train"] * 3 + ["validation"] * 2
SEQUENCES = len(TEXT)
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def seen(sequence: int, layer: int) -> Seen:
    mx.random.seed(100 * sequence + layer)
    x, up = mx.random.normal((TOKENS, WIDTH)), mx.random.normal((TOKENS, ROWS))
    gate = mx.random.normal((TOKENS, ROWS))
    return Seen(layer, x, gate, up, mx.maximum(gate, 0) * up)


def recorder(path):
    return Recorder(path, RECORDS, LAYERS, lambda x: x)


def record(path, until=SEQUENCES, after=lambda: None):
    """Go on until so many sequences are there; ``after`` is called after every step of it."""
    path.mkdir(exist_ok=True)
    found = recorder(path)
    begun = found.done
    after()
    for i in range(begun, until):
        found.part = TEXT[i]
        for layer in range(LAYERS):
            found(seen(i, layer))
            after()
        found.losses["validation"] += i
        found.commit()
        after()
    return begun, found


def content(path, found):
    """All that was recorded."""
    parts = {}
    for layer in range(LAYERS):
        train, rest = (Part(path, layer, p, ROWS, WIDTH, mx.float32) for p in RECORDS)
        parts |= {(layer, "x"): train.floats("x"), (layer, "active"): train.active()}
        parts |= {(layer, what): rest.floats(what) for what in ("gate", "h")}
    arrays = [np.array(part) for part in parts.values()]
    return arrays, found.squares, (found.counts, found.losses, found.done)


def assert_same(a, b):
    for one, other in zip([*a[0], *a[1]], [*b[0], *b[1]], strict=True):
        np.testing.assert_array_equal(one, other)
    assert a[2] == b[2]


@pytest.fixture
def expected(tmp_path):
    path = tmp_path / "undisturbed"
    return content(path, record(path)[1])


def test_broken_off_anywhere_it_ends_the_same(tmp_path, expected):
    steps = SEQUENCES * (LAYERS + 1) + 1
    for step in range(steps):
        path, left = tmp_path / f"{step}", [step]

        def strike(left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            record(path, after=strike)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            begun, found = record(path)
        assert begun == step // (LAYERS + 1)
        assert_same(content(path, found), expected)


@needs_proc
@pytest.mark.durability
def test_power_lost_anywhere_it_ends_the_same(tmp_path, monkeypatch, expected):
    """What the state file names has reached the disk; a loss costs one sequence at most."""
    path, power, lost = tmp_path / "work", PowerLoss(monkeypatch), []

    def strike():
        lost.append(power.strikes(path, tmp_path / f"after-{len(lost)}"))

    record(path, after=strike)
    for step, after in enumerate(lost):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            begun, found = record(after)
        assert begun == step // (LAYERS + 1)
        assert_same(content(after, found), expected)


def test_data_reach_the_disk_before_the_state_file(tmp_path, monkeypatch):
    done = []
    sync, atomic_write = recordings.sync, recordings.atomic_write
    monkeypatch.setattr(recordings, "sync", lambda p: (done.append(p.name), sync(p)))
    monkeypatch.setattr(
        recordings, "atomic_write", lambda p, c: (done.append(p.name), atomic_write(p, c))
    )
    record(tmp_path / "work", until=1)
    files = {recordings.file_name(i, "train", what) for i in range(2) for what in ("x", "active")}
    assert set(done[:4]) == files
    assert done[4:] == ["work", STATE]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def spoil(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("layer-001.train.x.bits", cut, "layer-001.train.x.bits has"),
        ("layer-000.validation.h.bits", lambda f: f.unlink(), r"validation.h.bits has 0 bytes"),
        ("squares-0.npz", cut, "squares-0.npz is missing or cut off"),
        ("squares-0.npz", spoil, "squares-0.npz is missing or cut off"),
        ("squares-0.npz", lambda f: f.write_bytes(b""), "squares-0.npz is missing"),
        ("squares-0.npz", lambda f: f.unlink(), "squares-0.npz is missing"),
        (STATE, cut, "is damaged"),
        (STATE, lambda f: f.write_text("[]"), "is damaged"),
        (STATE, lambda f: f.write_text("null"), "is damaged"),
        (STATE, lambda f: f.write_text('{"sizes": {}, "done": 4}'), "is damaged"),
        (STATE, lambda f: f.write_text('{"sizes": {"layer-0": "x"}}'), "is damaged"),
        (STATE, lambda f: f.write_bytes(b"\xff\xfe"), "is damaged"),
    ],
)
def test_damaged_recordings_are_made_again(tmp_path, expected, name, damage, reason):
    path = tmp_path / "work"
    record(path, until=4)
    damage(path / name)
    with pytest.warns(FlashWarning, match=reason) as told:
        begun, found = record(path)
    (message,) = [str(w.message) for w in told if w.category is FlashWarning]
    assert message.endswith("it is recorded again")
    assert begun == 0
    assert_same(content(path, found), expected)


def test_a_damaged_fit_is_fitted_again(tmp_path):
    recordings.save_layer(tmp_path, "000-0.9", {"a": 1}, {"b": np.ones(300)})
    file = tmp_path / "fitted-000-0.9.npz"
    assert recordings.load_layer(tmp_path, "000-0.9")[0] == {"a": 1}
    for damage in (spoil, cut, lambda f: f.write_bytes(b"\0" * 100), lambda f: f.unlink()):
        damage(file)
        assert recordings.load_layer(tmp_path, "000-0.9") is None


def test_damaged_experts_are_recorded_again(tmp_path):
    for i in range(3):
        trace.save(tmp_path, i, {"chosen-0": np.full((TOKENS, 2), i)})
    assert trace.recorded(tmp_path, 3) == trace.recorded(tmp_path, 5) == 3
    spoil(tmp_path / "experts-00001.npz")
    with pytest.warns(FlashWarning, match=r"experts-00001.npz is damaged; .*recorded again"):
        assert trace.recorded(tmp_path, 3) == 1
    trace.save(tmp_path, 1, {"chosen-0": np.full((TOKENS, 2), 1)})
    assert trace.recorded(tmp_path, 3) == 3


def test_the_command_says_so_in_a_line(monkeypatch, capsys):
    def run(args):
        warnings.warn(FlashWarning("this is damaged; it is made again"), stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("mlx_flash.cli.inspect.run_verify", run)
    with pytest.warns(UserWarning, match="another"):
        assert cli.main(["verify", "--model", "x"]) == 0
    assert capsys.readouterr().err == "mlx_flash: this is damaged; it is made again\n"
