"""Memory cgroups, and the command line run in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The kernel counts the parent's memory into a child's peak at fork, so a small process starts it.
RUNNER = """
import json, os, subprocess, sys
group, *command = sys.argv[1:]
enter = (lambda: open(group, "w").write(str(os.getpid()))) if group else None
child = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=enter
)
output = child.stdout.read()
_, status, usage = os.wait4(child.pid, 0)
scale = 1 if sys.platform == "darwin" else 1024
print(json.dumps([os.waitstatus_to_exitcode(status), output, usage.ru_maxrss * scale]))
"""


def cli(*args: str, limit: int | None = None) -> tuple[int, str, int]:
    """Run mlx_flash in a process: (exit code, output, peak resident bytes by the kernel).

    ``limit`` puts it into a memory cgroup of that many bytes, where groups can be made.
    """
    with cgroup(limit) as group:
        done = subprocess.run(
            [sys.executable, "-c", RUNNER, group, sys.executable, "-m", "mlx_flash", *args],
            check=True,
            capture_output=True,
            text=True,
        )
    code, output, peak = json.loads(done.stdout)
    return code, output, peak


def cgroup_root() -> Path | None:
    """A memory controller that groups can be made in, or None."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        if (root / "cgroup.procs").exists() and os.access(root, os.W_OK):
            v2 = root / "cgroup.subtree_control"
            if root.name == "memory" or (v2.exists() and "memory" in v2.read_text().split()):
                return root
    return None


@contextmanager
def cgroup(limit: int | None) -> Iterator[str]:
    """A memory cgroup of ``limit`` bytes; yields the file that takes a process in, or ""."""
    root = cgroup_root() if limit is not None else None
    if root is None:
        yield ""
        return
    group = root / f"mlx_flash_bench_{os.getpid()}"
    group.mkdir()
    v1 = root.name == "memory"
    try:
        (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
        yield str(group / "cgroup.procs")
    finally:
        group.rmdir()
