"""Sizes in bytes, as people write and read them: kB, MB, GB are powers of 1000 and KiB, MiB, GiB powers of 1024."""

from __future__ import annotations

import re

from offsite_fl.errors import ConfigError

MB, GB = 10**6, 10**9
_LETTERS = ("", "K", "M", "G", "T")


def parse_bytes(text: str) -> int:
    """Bytes in a size such as ``"20GB"``, ``"512 MiB"`` or ``"1000000"``.

    >>> parse_bytes("2GB"), parse_bytes("2 GiB")
    (2000000000, 2147483648)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i)?)?B?\s*", text, re.IGNORECASE)
    if not match:
        raise ConfigError(f"size {text!r} can't be read; write it as 20GB, 512MiB or a number of bytes")
    number, letter, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _LETTERS.index((letter or "").upper()))


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and networks are sold, to three digits.

    >>> human_bytes(999), human_bytes(200_000_000), human_bytes(1_234_567)
    ('999 B', '200 MB', '1.23 MB')
    """
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:#.3g}".rstrip(".") + f" {unit}"
