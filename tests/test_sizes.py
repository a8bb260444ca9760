"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from offsite_fl.errors import ConfigError
from offsite_fl.sizes import human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7", 7),
        ("7B", 7),
        ("2KB", 2000),
        ("2 kib", 2048),
        ("1.5MB", 1_500_000),
        ("1.5MiB", 1_572_864),
        ("20G", 20_000_000_000),
        ("1TiB", 2**40),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1 PB", "1e3", "1 2"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (20_000, "20.0 kB"),
        (200_000_000, "200 MB"),
        (1_930_000_000, "1.93 GB"),
        (999_700, "1.00 MB"),
        (-1500, "-1.50 kB"),
        (2**60, "1.15 EB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human_bytes(size) == text
