"""``make demo``: the main job from end to end on this machine, with the model that a package ships.

Runs the quickstart app on a SuperLink of its own with four simulated data owners, and ends with the five rows and
``runs/demo/report.html``. Nothing is left running.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.record import RunReport
from simulations.local_flower import local_flower
from simulations.texts import OWNERS, books_folder, fetch, quickstart_folder, write_book_files, write_owner_files

APP = Path(__file__).parent / "quickstart"
PICO = APP / "pico.toml"  # what a small model wants otherwise than the app's own settings say
console = Console()


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 if the report was written, 1 with the reason in red if not."""
    parser = argparse.ArgumentParser(prog="python -m simulations.demo", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2 (135 M parameters), pico (made here), or a folder")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the report, emptied first")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the app's run config")
    parser.add_argument("--gpus-per-client", type=float, default=0.0, help="share of a GPU a client (docs/gpu.md)")
    options = parser.parse_args(arguments)
    if wrong := [pair for pair in options.set if "=" not in pair]:
        parser.error(f"--set {wrong[0]!r} isn't KEY=VALUE")
    started = time.perf_counter()
    try:
        overrides = dict(pair.split("=", 1) for pair in options.set)
        demo(options.model, options.out.absolute(), overrides, options.gpus_per_client)
    except OffsiteError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console.print(f"done in {time.perf_counter() - started:.0f} s: {options.out / 'report.html'}", soft_wrap=True)
    return 0


def demo(model: str, out: Path, overrides: dict[str, str], gpus_per_client: float = 0.0) -> RunReport:
    """Prepare data and model, run the app, read the report back."""
    if out.exists():
        if any(out.iterdir()) and not (out / "flower").is_dir():
            raise OffsiteError(f"{out} isn't the folder of an earlier demo and won't be emptied; give another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    fetch()
    for folder, write in ((quickstart_folder(), write_owner_files), (books_folder(), write_book_files)):
        if not (folder / "public.txt").is_file():  # written last
            write(folder)
    settings: dict[str, object] = {}
    if model == "pico":
        from simulations.pico import pico_folder  # imports torch, which the other models' demo needn't do here

        pico_folder(progress=True)
        settings |= _flat(tomllib.loads(PICO.read_text(encoding="utf-8")))
    settings |= {"model": model, "run.folder": str(out)}
    with local_flower(out / "flower", supernodes=len(OWNERS), gpus_per_client=gpus_per_client) as flower:
        code = flower.run(APP, settings | {key: _typed(value) for key, value in overrides.items()})
    if code or not (out / "report.json").is_file():
        raise OffsiteError(f"the run ended without a report (exit code {code}); see {out / 'flower' / 'superlink.log'}")
    return RunReport.read(out)


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


if __name__ == "__main__":
    sys.exit(main())
