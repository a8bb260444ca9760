"""Leases: many may use, one may delete, and a deleted lock file guards nothing."""

from __future__ import annotations

import threading
from pathlib import Path

from offsite_fl.bundle.locks import Lease


def test_shared_and_exclusive(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    one, two = Lease.take(path), Lease.take(path)
    assert one and two
    assert Lease.take(path, exclusive=True, wait=False) is None
    one.release()
    one.release()
    assert Lease.take(path, exclusive=True, wait=False) is None
    del two  # an object that is collected lets go
    alone = Lease.take(path, exclusive=True, wait=False)
    assert alone
    assert Lease.take(path, wait=False) is None
    with alone:
        pass
    assert Lease.take(path, wait=False)


def test_waiting_for_a_lock_file_that_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = Lease.take(path, exclusive=True)
    assert holder
    got: list[Lease | None] = []
    waiter = threading.Thread(target=lambda: got.append(Lease.take(path)))
    waiter.start()
    path.unlink()
    holder.release()
    waiter.join(timeout=10)
    # The waiter's lock is on the file that is there now, not on the deleted one.
    assert got[0] and path.exists()
    assert Lease.take(path, exclusive=True, wait=False) is None
