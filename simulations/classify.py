"""``make vision`` and ``make classify``: a classifier tuned by four data owners, from end to end on this machine.

Runs the app in ``simulations/vision`` on a SuperLink of its own, with a packaged model and packaged data, and ends with
the five rows in accuracy and a report page. Nothing is left running.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from offsite_fl.evaluation.record import RunReport
from simulations import digits
from simulations.running import emptied, finish, parse, run_app, settings_of
from simulations.texts import fetch, kinds_folder, write_kind_files

APP = Path(__file__).parent / "vision"
# What is classified: a file with what it wants otherwise than the app's own settings say, and the folder of results.
TASKS: dict[str, tuple[Path | None, Path]] = {
    "images": (None, Path("runs/vision")),
    "texts": (APP / "encoder.toml", Path("runs/classify")),
}
OWNERS = 4


def main(arguments: list[str] | None = None) -> int:
    """Run it; 0 if the report was written, 1 with the reason in red if not."""
    parser = argparse.ArgumentParser(prog="python -m simulations.classify", description=__doc__)
    parser.add_argument("--task", default="images", choices=TASKS, help="digits by DINOv2, or texts by MiniLM")
    parser.add_argument("--owners", type=int, default=OWNERS, help="how many data owners are simulated")
    options = parse(parser, arguments, None)
    out = options.out or TASKS[options.task][1]
    return finish(lambda: classify(options.task, out.absolute(), options.set, options.owners), out)


def classify(task: str, out: Path, overrides: dict[str, str], owners: int = OWNERS) -> RunReport:
    """Prepare the data, run the app, read the report back."""
    emptied(out)
    if task == "images":
        digits.fetch()
    else:
        fetch()
        if not (kinds_folder() / "train.jsonl").is_file():  # written last
            write_kind_files(kinds_folder())
    file, _ = TASKS[task]
    return run_app(APP, out, settings_of(file) if file else {}, overrides, supernodes=owners)


if __name__ == "__main__":
    sys.exit(main())
