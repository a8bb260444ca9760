"""Models that come inside Python packages: where their files lie, and a conversion that is done once."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from offsite_fl.config import cache_root


def packaged_files(package: str, pattern: str) -> list[Path]:
    """The files of an installed package that match ``pattern`` (as in ``Path.glob``), without importing it.

    The packages that ship models import engines that aren't needed to read the files. Empty where the package isn't
    installed.
    """
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return sorted(file for folder in folders for file in Path(folder).glob(pattern))


def written_once(name: str, find: Callable[[], Path], write: Callable[[Path, Path], None]) -> Path:
    """The folder ``name`` of the cache, filled on first use by ``write(find(), folder)``.

    It appears by one rename, so that it is whole or absent also when two processes write at once. Where ``find``
    raises, because a package isn't installed, nothing is made.
    """
    folder = cache_root() / name
    if folder.is_dir():
        return folder
    source = find()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        write(source, fresh)
        fresh.chmod(0o755)
        for file in fresh.iterdir():
            file.chmod(0o644)  # the safetensors library makes files that only their owner can read
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is, another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder
