"""Run by test_convert.py: kills a conversion at every one of its steps, and resumes it.

A step is anything that changes what is on the disk, or the end of a block of work. The child is
forked before MLX has started anything, dies by SIGKILL at step k (a write that it dies in is half
done), and another child runs the same command. Prints one JSON line: for every k what was found
after the kill, and whether what came out in the end is what an undisturbed run makes.

Arguments: new source, old source, target, scene, every how many steps. Scenes:
    fresh   nothing is there
    force   the old model is there, to be replaced
    other   an unfinished conversion of the old source is there
    twice   the second run is killed, too
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from mlx_flash.conversion import convert as convert_module
from mlx_flash.conversion import row_plan
from mlx_flash.errors import FlashError
from mlx_flash.storage import row_writer

NEW, OLD, OUT, SCENE, STRIDE = sys.argv[1:]
OUT = Path(OUT)
row_plan.BLOCK_BYTES = 1 << 15
convert_module.SHARD_BYTES = 1 << 16
os.fsync = lambda _fd: None  # a kill leaves the kernel and its cache alive


def forked(work, *args):
    """The wait status of a child that does ``work``."""
    if (pid := os.fork()) == 0:
        signal.alarm(60)
        code = 1
        try:
            code = work(*args) or 0
        except FlashError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            code = 99
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def convert(source, out=OUT, progress=None, force=SCENE == "force"):
    convert_module.convert(source, out, force=force, progress=progress)


def killed_at(k, source=NEW):
    """Convert and die at step ``k``."""
    count = 0

    def step():
        nonlocal count
        count += 1
        return count == k

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(function):
        def call(*args, **kwargs):
            if step():
                die()
            return function(*args, **kwargs)

        return call

    def half_written(fd, data, offset):
        if step():
            pwrite(fd, memoryview(data).cast("B")[: len(data) // 2], offset)
            die()
        return pwrite(fd, data, offset)

    def half_written_file(path, data):
        if step():
            write_bytes(path, data[: len(data) // 2])
            die()
        return write_bytes(path, data)

    pwrite, row_writer.os.pwrite = os.pwrite, half_written
    write_bytes = Path.write_bytes
    for name in ("fsync", "mkdir", "open"):
        setattr(os, name, watched(getattr(os, name)))
    for name in ("rename", "replace", "unlink", "rmdir"):
        setattr(Path, name, watched(getattr(Path, name)))
    shutil.copyfile = watched(shutil.copyfile)
    Path.write_bytes = half_written_file
    convert(source, progress=lambda *_: die() if step() else None)


def tree(path):
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def siblings():
    """Where which model is."""
    names = {new: "new", old: "old"}
    found = {p.name: names.get(tree(p), "other") for p in OUT.parent.iterdir()}
    return {name: what for name, what in found.items() if not name.endswith(".reference")}


def fresh():
    for path in OUT.parent.iterdir():
        if not path.name.endswith(".reference"):
            shutil.rmtree(path)
    if SCENE == "force":
        shutil.copytree(OUT.with_name("old.reference"), OUT)
    if SCENE == "other":
        assert os.WTERMSIG(forked(killed_at, 60, OLD)) == signal.SIGKILL


for source, name in ((NEW, "new"), (OLD, "old")):
    assert forked(convert, source, OUT.with_name(f"{name}.reference")) == 0
new, old = (tree(OUT.with_name(f"{name}.reference")) for name in ("new", "old"))
assert new != old

results = []
k = 1
while True:
    fresh()
    status = forked(killed_at, k)
    after = siblings()
    if status == 0:
        results.append({"k": k, "undisturbed": after})
        break
    if SCENE == "twice":
        forked(killed_at, k // 2 + 1)
    again = forked(convert, NEW)
    results.append(
        {
            "k": k,
            "signal": os.WTERMSIG(status),
            "after": after,
            "code": os.WEXITSTATUS(again),
            "end": siblings(),
        }
    )
    k += int(STRIDE)
sys.stdout.write(json.dumps(results))
