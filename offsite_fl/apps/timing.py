"""Seconds by stage, said aloud as each begins."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Clock:
    """Times the stages of a run. ``seconds``: wall time by stage, in order."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what happens inside the ``with`` block."""
        self.console.print(f"[bold]{stage}[/] ...")
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)
        self.console.print(f"[bold]{stage}[/] took {self.seconds[stage]:.1f} s")
