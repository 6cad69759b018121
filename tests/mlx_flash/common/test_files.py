"""Files written whole or not at all: after errors, kills, a power loss, by several at a time."""

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from mlx_flash.common import files
from mlx_flash.common.files import atomic_write, digest_of, is_temporary, replace_text, replacing


@pytest.mark.parametrize("content", ["a line\nand ä\n", b"\x00\xff", ""])
def test_writes_and_replaces(tmp_path, content):
    file = tmp_path / "file.txt"
    file.write_text("before")
    atomic_write(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


def test_mode_is_that_of_a_new_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    atomic_write(tmp_path / "file", "x")
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("at", ["writing", "fsync", "rename"])
def test_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, at):
    file = tmp_path / "file.txt"
    file.write_text("before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    if at == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if at == "rename":
        monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"), replacing(file) as temporary:
        temporary.write_text("half")
        if at == "writing":
            fail()
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.durability
def test_order_of_what_reaches_the_disk(tmp_path, monkeypatch):
    """The file before its name, the name before anything that the caller does next."""
    done = []
    real_replace, real_sync = Path.replace, files.sync

    def replace(path, target):
        done.append("rename")
        return real_replace(path, target)

    def sync(path):
        done.append("folder" if path.is_dir() else f"file of {path.stat().st_size}")
        real_sync(path)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files, "sync", sync)
    atomic_write(tmp_path / "file", "12345")
    assert done == ["file of 5", "rename", "folder"]


@pytest.mark.parametrize(("code", "fails"), [(22, False), (13, False), (5, True), (28, True)])
def test_folder_that_cannot_be_flushed(tmp_path, monkeypatch, code, fails):
    real = files.sync

    def sync(path):
        if path.is_dir():
            raise OSError(code, os.strerror(code))
        real(path)

    monkeypatch.setattr(files, "sync", sync)
    if fails:
        with pytest.raises(OSError, match=os.strerror(code)):
            atomic_write(tmp_path / "file", "x")
    else:
        atomic_write(tmp_path / "file", "x")
    assert (tmp_path / "file").read_text() == "x"


def test_temporary_names(tmp_path):
    names = set()
    for name in ("predictors.safetensors", "plot.png", "marker", "a" * 255):
        for _ in range(2):
            with replacing(tmp_path / name) as temporary:
                temporary.write_text("x")
                assert temporary.parent == tmp_path
                assert temporary.suffix == Path(name).suffix
                assert is_temporary(temporary)
                names.add(temporary.name)
    assert len(names) == 8
    assert not is_temporary(tmp_path / "mlx_flash-writing-notes.txt")
    assert not is_temporary(tmp_path / "predictors.safetensors")


def test_many_writers_of_one_file(tmp_path):
    file = tmp_path / "file.json"
    contents = [json.dumps({str(i): "x" * 10_000 * i}) for i in range(1, 9)]
    threads = [
        threading.Thread(target=lambda c=c: [atomic_write(file, c) for _ in range(5)])
        for c in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in contents
    assert list(tmp_path.iterdir()) == [file]


def test_users_files(tmp_path):
    """Links are followed, pipes and devices written to as they are."""
    target = tmp_path / "target.json"
    link = tmp_path / "link.json"
    link.symlink_to(target)
    replace_text(link, "first")
    replace_text(link, "second")
    assert link.is_symlink() and target.read_text() == "second"
    replace_text(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    thread = threading.Thread(target=lambda: read.append(pipe.read_text()))
    thread.start()
    replace_text(pipe, "through")
    thread.join()
    assert read == ["through"]


def test_digests():
    assert digest_of({"a": 1, "b": [2.5, None]}) == digest_of({"b": [2.5, None], "a": 1})
    # Kept on disk, in markers and in the headers of row files: the value itself may not change.
    assert digest_of({"a": 1, "b": [2.5, None]}) == "2daaea6dd63221f95a6ea3f054a77321"
    assert digest_of([1]) != digest_of(["1"])
    with pytest.raises(TypeError):
        digest_of({"a": object()})


def test_hashes_of_parts_of_files(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 40_000)  # more than two blocks
    seen = []
    whole = files.sha256_of(file, seen.append)
    assert sum(seen) == file.stat().st_size and len(seen) == 3
    assert files.hash_file_range(file, 0, 1 << 40) == whole
    (tmp_path / "part").write_bytes(file.read_bytes()[100:5_000_000])
    assert files.hash_file_range(file, 100, 4_999_900) == files.sha256_of(tmp_path / "part")
