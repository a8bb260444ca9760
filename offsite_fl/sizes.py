"""Sizes in bytes, as people write and read them; units are powers of 1024."""

from __future__ import annotations

import re

from offsite_fl.errors import ConfigError

KIB, MIB, GIB = 2**10, 2**20, 2**30
_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes in a size such as ``"20GB"``, ``"512 MiB"`` or ``"1000000"``; units are powers of 1024.

    >>> parse_bytes("2GB")
    2147483648
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"size {text!r} can't be read; write it as 20GB, 512MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def human_bytes(count: int) -> str:
    """A size for people: ``1536`` is ``"1.5 KiB"``."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
