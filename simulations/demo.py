"""``make demo``: the main job from end to end on this machine, with the model that a package ships.

Runs the quickstart app on a SuperLink of its own with four simulated data owners, and ends with the five rows and
``runs/demo/report.html``. Nothing is left running.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offsite_fl.evaluation.record import RunReport
from simulations.running import emptied, finish, parse, run_app, settings_of
from simulations.texts import (
    OWNERS,
    books_folder,
    choices_folder,
    fetch,
    quickstart_folder,
    write_book_files,
    write_choice_files,
    write_owner_files,
)

APP = Path(__file__).parent / "quickstart"
PICO = APP / "pico.toml"  # what a small model wants otherwise than the app's own settings say
TASKS = {"text": None, "choices": APP / "choices.toml"}  # and what a task wants otherwise
FILES = {quickstart_folder: write_owner_files, books_folder: write_book_files, choices_folder: write_choice_files}


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 if the report was written, 1 with the reason in red if not."""
    parser = argparse.ArgumentParser(prog="python -m simulations.demo", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2 (135 M parameters), pico (made here), or a folder")
    parser.add_argument(
        "--task", default="text", choices=TASKS, help="perplexity on text, or accuracy in multiple choice"
    )
    options = parse(parser, arguments, Path("runs/demo"))
    out = options.out.absolute()
    return finish(lambda: demo(options.model, out, options.set, options.gpus_per_client, options.task), options.out)


def demo(
    model: str, out: Path, overrides: dict[str, str], gpus_per_client: float = 0.0, task: str = "text"
) -> RunReport:
    """Prepare data and model, run the app, read the report back."""
    emptied(out)
    fetch()
    for folder, write in FILES.items():
        if not (folder() / "public.txt").is_file():  # written last
            write(folder())
    settings: dict[str, object] = {}
    if model == "pico":
        from simulations.pico import pico_folder  # imports torch, which the other models' demo needn't do here

        pico_folder(progress=True)
        settings |= settings_of(PICO)
    if (wanted := TASKS[task]) is not None:
        settings |= settings_of(wanted)
    settings["model"] = model
    return run_app(APP, out, settings, overrides, supernodes=len(OWNERS), gpus_per_client=gpus_per_client)


if __name__ == "__main__":
    sys.exit(main())
