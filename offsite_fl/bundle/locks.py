"""A lock on a name, shared or exclusive, between processes; it also stamps when the name was last used."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Windows has no flock: one process at a time is safe there, two at once aren't.
if sys.platform != "win32":
    import fcntl


class Lease:
    """An ``flock`` on the file ``path``, held until :meth:`release` or until the object is collected.

    A shared lease says "in use"; whoever wants to delete what it guards takes it exclusively. The file's modification
    time is the time of last use.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path, self._handle = path, handle

    @classmethod
    def take(cls, path: Path, *, exclusive: bool = False, wait: bool = True) -> Lease | None:
        """Take the lock; None if ``wait`` is False and another holder is in the way."""
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not _lock(handle, exclusive, wait):
                    os.close(handle)
                    return None
                # A holder may have deleted the file while we waited: then the lock guards nothing, try again.
                if _same_file(handle, path):
                    return cls(path, handle)
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)

    def touch(self) -> None:
        """Stamp the name as used now."""
        os.utime(self._handle)

    def release(self) -> None:
        """Let go; calling it again does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def _lock(handle: int, exclusive: bool, wait: bool) -> bool:
    if sys.platform != "win32":
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without locks, as some network ones: like Windows
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
