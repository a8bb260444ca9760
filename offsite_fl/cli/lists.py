"""``offsite-fl emulators`` and ``offsite-fl strategies``: what there is to choose from."""

from __future__ import annotations

import inspect
from dataclasses import asdict

from rich.table import Table

from offsite_fl.cli.output import AsJson, emit, line, result


def emulators(as_json: AsJson = False) -> None:
    """List the ways of compressing the middle, with their options, for `bundle --emulator`."""
    from offsite_fl.emulators import describe_emulators

    methods = describe_emulators()
    if as_json:
        emit([asdict(method) for method in methods])
        return
    table = Table(title="Emulators; chain them with +, e.g. layer-drop:keep=8+quantize:bits=8", title_justify="left")
    for name in ("name", "what it does", "options"):
        table.add_column(name)
    for method in methods:
        options = [
            f"{o.key} ({o.type}, " + ("needed" if o.default is None else f"default {o.default or 'none'}") + ")"
            for o in method.options
        ]
        table.add_row(method.name, line(method.summary), "\n".join(options), end_section=True)
    result().print(table)


def strategies(as_json: AsJson = False) -> None:
    """List the ways of averaging updates in a federation."""
    from offsite_fl.strategies.named import STRATEGIES

    found = [
        {"name": name, "summary": (inspect.getdoc(STRATEGIES[name]) or "").partition("\n")[0]} for name in STRATEGIES
    ]
    if as_json:
        emit(found)
        return
    table = Table(title="Strategies", title_justify="left")
    for name in ("name", "what it is"):
        table.add_column(name)
    for entry in found:
        table.add_row(entry["name"], line(entry["summary"]))
    result().print(table)
