"""Small file helpers: bounded reads that follow no links, hashes by pieces, writes that survive a crash."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from offsite_fl.errors import BundleError

PIECE = 2**20
# O_NOFOLLOW doesn't exist everywhere; the lstat in plain_size covers the rest.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def plain_size(path: Path, where: str) -> int:
    """Size of a regular file; ``BundleError`` if it is missing, a link, a folder or a device."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        raise BundleError(f"{where}: file {path.name} is missing") from None
    except OSError as error:
        raise BundleError(f"{where}: file {path.name} can't be read: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{where}: {path.name} must be an ordinary file, not a link, folder or device")
    return info.st_size


@contextmanager
def open_plain(path: Path, where: str) -> Iterator[BinaryIO]:
    """Open an ordinary file for reading, never through a link; failures are ``BundleError``."""
    plain_size(path, where)
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | _NO_LINK), "rb")
    except OSError as error:
        raise BundleError(f"{where}: file {path.name} can't be read: {error.strerror}") from error
    with file:
        yield file


def read_plain(path: Path, most: int, where: str) -> bytes:
    """Bytes of an ordinary file of at most ``most`` bytes; a larger one is refused before it is read."""
    size = plain_size(path, where)
    if size > most:
        raise BundleError(f"{where}: {path.name} has {size} bytes, at most {most} are allowed")
    with open_plain(path, where) as file:
        return file.read(most)


def sha256_of(path: Path, where: str) -> str:
    """SHA-256 of a file in hex, read by pieces of one MiB."""
    with open_plain(path, where) as file:
        digest = hashlib.sha256()
        while piece := file.read(PIECE):
            digest.update(piece)
        return digest.hexdigest()


def write_synced(path: Path, data: bytes | memoryview, mode: int = 0o666) -> None:
    """Write ``path`` so that it appears whole or not at all, even if the machine stops in between.

    ``mode`` are its permissions, less what the umask takes away.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        # Some file systems can't flush folders; the rename is still atomic there.
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below ``folder``, then ``folder`` itself."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync(path)
    sync(folder)


def discard(folder: Path) -> None:
    """Delete a folder of ours if it is there; what another process deletes meanwhile is none of our business."""
    shutil.rmtree(folder, ignore_errors=True)


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below ``folder``."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:  # being deleted by another process
            continue
    return total
