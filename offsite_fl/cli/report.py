"""``offsite-fl report``: show the result of a run again, and draw its page anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offsite_fl.cli.output import AsJson, emit, line, result


def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    as_json: AsJson = False,
) -> None:
    """Print the five rows of a run and draw report.html anew from its report.json.

    FOLDER is what a run wrote: `evaluate --out`, or a federation.
    """
    from offsite_fl.evaluation.record import RunReport
    from offsite_fl.evaluation.tables import print_report, summary

    found = RunReport.read(folder)
    home = folder if folder.is_dir() else folder.parent
    if not as_json:
        # First, because the page needs an extra that may be missing.
        print_report(found, result())
    found.write(home)
    if as_json:
        emit(summary(found) | {"report": str(home)})
    else:
        result().print(line(f"report: {home / 'report.html'}"), soft_wrap=True)
