"""``offsite-fl emulators`` and ``offsite-fl strategies``: what there is to choose from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from offsite_fl.cli.output import AsJson, emit, line, result

if TYPE_CHECKING:
    from offsite_fl.emulators.spec import MethodHelp, OptionHelp


def emulators(as_json: AsJson = False) -> None:
    """List the ways of compressing the middle, with their options, for `bundle --emulator`."""
    from offsite_fl.emulators import describe_emulators

    _show(describe_emulators(), "Emulators; chain them with +, e.g. layer-drop:keep=8+quantize:bits=8", as_json)


def strategies(as_json: AsJson = False) -> None:
    """List the ways of averaging updates in a federation, with their options."""
    from offsite_fl.strategies.named import describe_strategies

    methods = describe_strategies()
    common = [option for option in methods[0].options if all(option in method.options for method in methods)]
    title = "Strategies; options as in fedadam:eta=0.01,beta-1=0.9\n"
    title += "All take " + ", ".join(f"{option.key} ({option.default})" for option in common)
    _show(methods, title, as_json, common)


def _show(methods: Iterable[MethodHelp], title: str, as_json: bool, told_above: Collection[OptionHelp] = ()) -> None:
    if as_json:
        emit([asdict(method) for method in methods])
        return
    table = Table(title=title, title_justify="left")
    for name in ("name", "what it does", "options"):
        table.add_column(name)
    for method in methods:
        options = [
            f"{o.key} ({o.type}, " + ("needed" if o.default is None else f"default {o.default or 'none'}") + ")"
            for o in method.options
            if o not in told_above
        ]
        table.add_row(method.name, line(method.summary), "\n".join(options), end_section=True)
    result().print(table)
