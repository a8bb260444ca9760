"""Flower on this machine for the repository's own apps, which find ``simulations`` by the repository's root."""

from __future__ import annotations

import functools
from pathlib import Path

from offsite_fl.comparing.local_flower import (
    BIN,
    PATHS,
    QUIET,
    LocalFlower,
    background,
    config_text,
    free_port,
    module_path,
)
from offsite_fl.comparing.local_flower import local_flower as _local_flower
from offsite_fl.comparing.local_flower import superlink as _superlink

ROOT = Path(__file__).resolve().parents[1]

local_flower = functools.partial(_local_flower, environment=module_path(ROOT))
superlink = functools.partial(_superlink, environment=module_path(ROOT))

__all__ = [
    "BIN",
    "PATHS",
    "QUIET",
    "LocalFlower",
    "background",
    "config_text",
    "free_port",
    "local_flower",
    "superlink",
]
