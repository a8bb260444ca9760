"""How much memory a piece of work takes at its peak beyond what was held before, where the system tells it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Peak:
    """``bytes`` once the work is done; None where they can't be had honestly."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Measure what happens inside the ``with`` block.

    On a CUDA device the memory of its tensors counts, on Linux the resident memory of the process (its high-water mark
    is set back before, and what earlier work has freed is given back to the system, so that it can't hide a growth).
    Elsewhere nothing is told.
    """
    gc.collect()
    peak = Peak()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = max(0, torch.cuda.max_memory_allocated(device) - before)
        return
    held = _reset() if torch.device(device).type == "cpu" else None
    yield peak
    most = _resident("VmHWM")
    if held is not None and most is not None:
        peak.bytes = max(0, most - held)


def _reset() -> int | None:
    """Set the high-water mark back to what is held now, which is returned; None where this isn't Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(sizes[0]) * 1024 if sizes else None
