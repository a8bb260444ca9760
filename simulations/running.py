"""An app of this repository from end to end on this machine: a SuperLink of its own, simulated owners, a report."""

from __future__ import annotations

import argparse
import shutil
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.record import RunReport
from simulations.local_flower import local_flower

console = Console()


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None, out: Path | None) -> argparse.Namespace:
    """Add what all apps' commands have in common to ``parser`` and parse; ``set`` becomes a dict."""
    parser.add_argument("--out", type=Path, default=out, help="folder for the report, emptied first")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the app's run config")
    parser.add_argument("--gpus-per-client", type=float, default=0.0, help="share of a GPU a client (docs/gpu.md)")
    options = parser.parse_args(arguments)
    if wrong := [pair for pair in options.set if "=" not in pair]:
        parser.error(f"--set {wrong[0]!r} isn't KEY=VALUE")
    options.set = dict(pair.split("=", 1) for pair in options.set)
    return options


def finish(run: Callable[[], object], out: Path) -> int:
    """Run it and say how long it took; 0 if the report was written, 1 with the reason in red if not."""
    started = time.perf_counter()
    try:
        run()
    except OffsiteError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console.print(f"done in {time.perf_counter() - started:.0f} s: {out / 'report.html'}", soft_wrap=True)
    return 0


def emptied(out: Path) -> Path:
    """The folder ``out``, new or empty; ``OffsiteError`` where it holds something other than an earlier run."""
    if out.exists():
        if any(out.iterdir()) and not (out / "flower").is_dir():
            raise OffsiteError(f"{out} isn't the folder of an earlier demo and won't be emptied; give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    return out


def run_app(
    app: Path,
    out: Path,
    settings: Mapping[str, object],
    overrides: Mapping[str, str],
    *,
    supernodes: int,
    gpus_per_client: float = 0.0,
) -> RunReport:
    """Run the app in the folder ``app`` with so many simulated owners and read its report back from ``out``."""
    settings = {**settings, "run.folder": str(out), **{key: _typed(value) for key, value in overrides.items()}}
    with local_flower(out / "flower", supernodes=supernodes, gpus_per_client=gpus_per_client) as flower:
        code = flower.run(app, settings)
    if code or not (out / "report.json").is_file():
        raise OffsiteError(f"the run ended without a report (exit code {code}); see {out / 'flower' / 'superlink.log'}")
    return RunReport.read(out)


def settings_of(path: Path) -> dict[str, object]:
    """A file for ``flwr run --run-config`` as a flat table."""
    return _flat(tomllib.loads(path.read_text(encoding="utf-8")))


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Dotted keys, as Flower's run config has them."""
    found: dict[str, object] = {}
    for key, value in table.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _typed(text: str) -> object:
    """A value from the command line as TOML would read it: number, truth value, else text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text, text)
