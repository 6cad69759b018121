"""Sizes in bytes: read from text, shown to people, rounded."""

from __future__ import annotations

import re
from decimal import Decimal

from mlx_flash.errors import BudgetError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_ram(size: int | str) -> int:
    """Bytes from an int, "1.5GB" (10^9), "512MiB" (2^20) or a bare number of bytes."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise BudgetError(f"RAM budget {size!r} is not a size; give bytes or text such as '1.5GB'")
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", size)
        if not match or match[2].upper() not in UNITS:
            raise BudgetError(
                f"RAM budget {size!r} is not a size; expected bytes or a number with KB, MB, GB, "
                "KiB, MiB or GiB, such as 1.5GB or 512MiB"
            )
        size = int(Decimal(match[1]) * UNITS[match[2].upper()])
    if not 0 < size < 2**63:
        raise BudgetError("a RAM budget is more than 0 and less than 2^63 bytes")
    return size


def show(nbytes: float) -> str:
    """Bytes for people, in decimal units: 1.50 GB, 380 MB."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    if nbytes >= 1e6:
        return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
    return f"{nbytes / 1e3:.1f} KB" if nbytes >= 1e3 else f"{int(nbytes)} B"


def with_margin(nbytes: int) -> int:
    """To whole megabytes and one more: a process does not take the same twice."""
    return (-(-nbytes // 10**6) + 1) * 10**6


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below ``n``."""
    return -(-n // multiple) * multiple
