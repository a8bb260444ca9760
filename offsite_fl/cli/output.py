"""What the commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import rich
import typer
from rich.console import Console
from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]


def result() -> Console:
    """The console for results: stdout."""
    return Console()


def emit(value: Any) -> None:
    """Print ``value`` as the one JSON document of a command; numbers that aren't finite become null."""
    from offsite_fl.evaluation.checks import jsonable

    typer.echo(json.dumps(jsonable(value), indent=1, allow_nan=False))


def line(text: str) -> Text:
    """``text`` as a single line without control characters, for it may hold names that others chose.

    >>> str(line("a\\nb \\x1b[2J"))
    'a b \\\\x1b[2J'
    """
    flat = " ".join(text.split())
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in flat))


def fail(message: str) -> None:
    """Print an error as one red line to stderr."""
    Console(stderr=True).print(Text("error: ").append_text(line(message)), style="red", soft_wrap=True)


class Stages:
    """Says on stderr what is being done and how long it took; the bars inside a stage are the library's own.

    ``seconds`` holds the wall time of each stage, in order.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Announce ``stage``, and time what happens inside the ``with`` block."""
        console = rich.get_console()
        console.print(Text(f"{stage} ..."), soft_wrap=True)
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 3)
        console.print(Text(f"{stage}: {self.seconds[stage]:.1f} s", style="dim"), soft_wrap=True)
