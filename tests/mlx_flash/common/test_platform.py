"""What the system tells of this process and this machine; macOS by a fake libSystem."""

import ctypes
import resource
import sys

import pytest
from support import platforms
from support.platforms import FakeDarwin, FakeLibSystem

from mlx_flash.common import platform
from mlx_flash.common.platform import Darwin, Linux, Platform, RusageInfo, current_platform


def test_figures_of_this_system():
    system = current_platform()
    assert system.name == sys.platform
    assert system.peak_process_bytes() >= system.process_bytes() * 0.9 > 10_000_000
    assert system.machine_bytes() > system.peak_process_bytes()
    assert f"{system._model()}, " in system.machine_name()
    assert " cores, " in system.machine_name()
    system.trim()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_linux_counts_what_is_there_now():
    system = Linux()
    before = system.process_bytes()
    block = bytearray(200_000_000)
    grown = system.process_bytes()
    del block
    system.trim()
    assert grown - before > 150_000_000
    assert system.process_bytes() - before < 100_000_000
    assert system.peak_process_bytes() - before > 150_000_000
    assert (system.uncached_reads, system.linux_aio) == ("O_DIRECT", sys.maxsize > 2**32)


def test_a_system_of_which_nothing_is_known():
    """The peak stands for what is not told; nothing particular is tried."""
    system = Platform()
    assert system.process_bytes() == system.peak_process_bytes()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert system.peak_process_bytes() == pytest.approx(most * 1024, rel=0.1)
    assert (system.uncached_reads, system.linux_aio, system.huge_pages) == ("", False, False)


def test_struct_of_macos():
    """Offsets of <sys/resource.h>: 16 bytes, then 35 numbers of 8 bytes."""
    assert ctypes.sizeof(RusageInfo) == platforms.RUSAGE_BYTES == 16 + 35 * 8
    assert RusageInfo.user_time.offset == 16
    assert RusageInfo.phys_footprint.offset == platforms.PHYS_FOOTPRINT
    assert RusageInfo.lifetime_max_phys_footprint.offset == platforms.LIFETIME_MAX_PHYS_FOOTPRINT
    assert RusageInfo.runnable_time.offset == platforms.RUSAGE_BYTES - 8


def test_macos_tells_now_from_the_peak():
    now = [300]
    library = FakeLibSystem(lambda: now[0] * 10**6)
    library.peak = 0
    system = Darwin(library)
    high = []
    for n in (300, 5000, 200):
        now[0] = n
        assert system.process_bytes() == n * 10**6
        high.append(system.peak_process_bytes())
    assert high[1] == high[2] == 5000 * 10**6
    system.trim()
    assert library.relieved == 1


def test_macos_that_refuses_its_figures(monkeypatch):
    """The peak in bytes, from getrusage: too high rather than too low."""
    library = FakeLibSystem()
    library.refuses = True
    library.values.clear()
    system = FakeDarwin(library)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert system.process_bytes() == pytest.approx(most, rel=0.1)
    assert system.peak_process_bytes() == pytest.approx(most, rel=0.1)
    assert system.machine_bytes() == Platform().machine_bytes()
    monkeypatch.setattr(platform.platform, "processor", lambda: "arm")
    assert system.machine_name().startswith("arm, ")


def test_macs_have_names_of_their_own(monkeypatch):
    """Two models with one processor, as many cores and one release of macOS differ."""
    names = set()
    for model, brand in (
        (b"Mac14,9\0", b"Apple M2 Pro\0"),
        (b"Mac14,12\0", b"Apple M2 Pro\0"),
        (b"Mac16,1\0", b"Apple M4\0"),
    ):
        library = FakeLibSystem()
        library.values |= {"hw.model": model, "machdep.cpu.brand_string": brand}
        names.add(FakeDarwin(library).machine_name())
    assert len(names) == 3
    assert any(name.startswith("Apple M2 Pro, Mac14,9, ") for name in names)
    assert FakeDarwin().machine_bytes() == platforms.MAC_MEMORY


def test_cache_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert Linux().cache_folder() == tmp_path / ".cache" / "mlx_flash"
    assert FakeDarwin().cache_folder() == tmp_path / "Library" / "Caches" / "mlx_flash"
    assert not (tmp_path / ".cache").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert Linux().cache_folder() == tmp_path / "elsewhere" / "mlx_flash"


def test_the_fixture(darwin, tmp_path):
    from mlx_flash.storage import direct_io, huge_pages, linux_aio

    assert platform.current_platform() is darwin
    assert linux_aio.why_not() == "not known for darwin on arm64"
    (tmp_path / "file").write_bytes(b"x")
    fd, direct = direct_io.open_direct(tmp_path / "file")
    assert direct and direct_io.fcntl.uncached == [fd]
    assert len(huge_pages.buffers(2, 5000)) == 2
