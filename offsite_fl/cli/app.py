"""The program: its commands, and the one place where errors become a line of text and an exit code."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import click
import rich
import typer
from typer.core import TyperGroup

from offsite_fl.cli import lists
from offsite_fl.cli.bundle import bundle
from offsite_fl.cli.choose import choose
from offsite_fl.cli.compare import compare
from offsite_fl.cli.evaluate import evaluate
from offsite_fl.cli.inspect import inspect
from offsite_fl.cli.output import fail
from offsite_fl.cli.plug import plug
from offsite_fl.cli.repair import repair
from offsite_fl.cli.report import report
from offsite_fl.cli.tune import tune
from offsite_fl.errors import OffsiteError
from offsite_fl.version import __version__

USER_ERROR, INTERRUPTED = 1, 130
EPILOG = "Exit codes: 0 done, 1 something given is wrong (the reason is on stderr), 2 usage, 130 interrupted."


class Commands(TyperGroup):
    """Runs a command; what a user did wrong ends as one line on stderr, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that ``ctx`` names."""
        # The library's progress bars draw on rich's own console; stdout belongs to results.
        rich.reconfigure(stderr=True)
        try:
            return super().invoke(ctx)
        except OffsiteError as error:
            fail(str(error))
            raise typer.Exit(USER_ERROR) from error
        except OSError as error:
            if error.errno in (None, errno.EPIPE):  # a closed pipe is click's to handle, the others are our bugs
                raise
            fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as error:
            fail("interrupted")
            raise typer.Exit(INTERRUPTED) from error
        finally:
            rich.reconfigure()


app = typer.Typer(
    name="offsite-fl",
    cls=Commands,
    help="Adapt a language model with data that its owner never sees, at owners who never hold the model.",
    epilog=EPILOG,
    no_args_is_help=True,
    # Past OffsiteError a traceback means a bug in here, and is wanted as Python prints it.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"offsite-fl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


OWNER, DATA, BOTH = "The model owner", "The data owner", "To look at"
for _command, _panel in (
    (choose, OWNER),
    (bundle, OWNER),
    (repair, OWNER),
    (plug, OWNER),
    (evaluate, OWNER),
    (tune, DATA),
    (inspect, BOTH),
    (report, BOTH),
    (compare, BOTH),
    (lists.emulators, BOTH),
    (lists.strategies, BOTH),
):
    app.command(rich_help_panel=_panel)(_command)


def main() -> None:
    """Run the program on ``sys.argv`` and exit."""
    app(prog_name="offsite-fl")
