"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from offsite_fl.errors import ConfigError
from offsite_fl.sizes import human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("7", 7), ("7B", 7), ("2KB", 2048), ("2 kib", 2048), ("1.5MB", 1572864), ("20G", 21474836480), ("1TiB", 2**40)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1 PB", "1e3", "1 2"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (3 * 2**40, "3.0 TiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert human_bytes(size) == text
