"""``offsite-fl compare``: federations side by side, by a grid file."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import rich
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from offsite_fl.cli.files import check_writable
from offsite_fl.cli.output import AsJson, emit, line, result

if TYPE_CHECKING:
    from offsite_fl.comparing.results import Measured
    from offsite_fl.comparing.run import Comparison, State


def compare(
    grid: Annotated[Path, typer.Argument(metavar="GRID.toml", help="What is compared; docs/compare.md has the keys.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of this comparison (runs/compare-NAME); what is there isn't run again."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Flower runs side by side, which share the cores.")] = 1,
    gpus_per_client: Annotated[float, typer.Option(min=0.0, help="Share of a GPU that a client takes.")] = 0.0,
    tracker: Annotated[
        str, typer.Option(metavar="NAME", help="tensorboard or mlflow: each measured cell becomes a run there.")
    ] = "",
    tracking: Annotated[
        str, typer.Option(metavar="WHERE", help="Its folder, for mlflow also an address (FOLDER/tracking).")
    ] = "",
    show: Annotated[bool, typer.Option("--list", help="Print the cells and which are done, and leave.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid of federations and their references, and say which strategy leads and how sure that is.

    FOLDER gets cells.jsonl with everything measured, compare.html, .csv, .tex and .json. The same command goes on
    where it was interrupted.
    """
    from offsite_fl.comparing.run import Comparison
    from offsite_fl.comparing.settings import read_grid
    from offsite_fl.evaluation.plots import require_matplotlib
    from offsite_fl.evaluation.tracking import check_tracker

    folder = out or Path("runs") / f"compare-{grid.stem}"
    check_writable(folder / "compare.json")
    require_matplotlib()  # before the long work, which would have no page
    check_tracker(tracker, tracking)
    comparison = Comparison(read_grid(grid), folder)
    if show:
        _list(comparison.states(), as_json)
        return
    _end_children_on(signal.SIGTERM)
    measured = _run(comparison, parallel, gpus_per_client, (tracker, tracking))
    _report(comparison, measured, as_json)


def _run(comparison: Comparison, parallel: int, gpus_per_client: float, tracker: tuple[str, str]) -> list[Measured]:
    from offsite_fl.comparing.tracking import CellTracker

    states = comparison.states()
    track = CellTracker(comparison.places, *tracker)
    done = sum(state.measured is not None for state in states)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=rich.get_console(), transient=True) as bar:
        task = bar.add_task("cells", total=len(states), completed=done)

        def watch(found: Measured) -> None:
            last = found.last
            said = f"failed: {found.error}" if found.error else f"plug-in {last.plug_in:.3f}" if last else "no result"
            bar.console.print(line(f"{found.cell.label}: {said} ({found.seconds:.0f} s)"), soft_wrap=True)
            bar.advance(task)
            track(found)

        return comparison.run(parallel, gpus_per_client, watch)


def _report(comparison: Comparison, measured: list[Measured], as_json: bool) -> None:
    from offsite_fl.comparing.page import sentence
    from offsite_fl.comparing.report import to_dict, write_report
    from offsite_fl.comparing.summary import Summary
    from offsite_fl.comparing.table import rich_tables
    from offsite_fl.evaluation.record import versions

    summary = Summary.of(comparison.settings, measured)
    files = write_report(summary, comparison.places, versions())
    if as_json:
        emit(to_dict(summary, versions()) | {"out": str(comparison.out)})
        return
    console = result()
    for table in rich_tables(summary):
        console.print(table)
    for found in summary.failed:
        console.print(line(f"failed: {found.cell.label}: {found.error}"), style="yellow", soft_wrap=True)
    if summary.lead is not None:
        console.print(line(f"{summary.lead.best.label} leads"), style="bold", soft_wrap=True)
    console.print(line(sentence(summary.lead)), soft_wrap=True)
    for path in files:
        console.print(line(f"{path.suffix[1:]}: {path}"), soft_wrap=True)


def _list(states: list[State], as_json: bool) -> None:
    rows = [(s.cell.label, "done" if s.measured else "failed" if s.failed else "to do", s.key) for s in states]
    if as_json:
        emit([{"cell": label, "state": state, "key": key} for label, state, key in rows])
        return
    table = Table("cell", "state", "key")
    for label, state, key in rows:
        table.add_row(line(label), state, key[:12])
    result().print(table)


def _end_children_on(number: signal.Signals) -> None:
    """Leave by an exception, so that what was started is ended; by default this signal would leave it running."""

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(number, leave)
