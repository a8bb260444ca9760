"""Results that appear whole or not at all, and never over something else."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offsite_fl.errors import ConfigError, UpdateError


def check_writable(out: Path) -> None:
    """``ConfigError`` if ``out`` can't be made; asked before the long work whose result it is to hold."""
    place = Path(os.path.abspath(out)).parent
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{out} can't be written: {place} isn't a folder that you may write to; give another --out")


def check_new_folder(out: Path) -> None:
    """``ConfigError`` unless ``out`` can be made and is free: not there, or an empty folder."""
    check_writable(out)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is in the way: it isn't a folder; give another --out")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} isn't empty and won't be overwritten; give another --out")


def check_update_file(out: Path) -> None:
    """``ConfigError`` or ``UpdateError`` unless ``out`` can be made and is free, or an update that may be replaced."""
    from offsite_fl.update import Update

    check_writable(out)
    if not out.exists():
        return
    try:
        Update.load(out)
    except UpdateError:
        raise UpdateError(f"{out} exists and isn't an update; it won't be overwritten, give another --out") from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` at the end of the ``with`` block and vanishes if that fails."""
    from offsite_fl.bundle.files import discard, sync_tree

    check_new_folder(out)
    out = Path(os.path.abspath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}.writing-{uuid.uuid4().hex[:8]}")
    stage.mkdir()
    try:
        yield stage
        sync_tree(stage)
        if out.is_dir():
            out.rmdir()  # empty, or this fails and changes nothing
        stage.rename(out)
    except BaseException:
        discard(stage)
        raise
