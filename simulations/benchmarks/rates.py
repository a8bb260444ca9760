"""Learning rates of the apps that end in accuracy, judged by examples that no table reports.

They are cut from what the data owners tune on: the last 400 of ``images`` and of ``texts``, the last 64 questions of
each owner of ``choices``. The test stays out of it. A run (seed 0) tries one rate of the data owners and one of full
fine-tuning; one that has its report isn't done again. docs/vision.md and docs/quality.md have the commands, from the
repository root, in the environment of ``make venv``, after ``make vision-data``::

    python -m simulations.benchmarks.rates images --lr 1e-4 --full-lr 3e-5 --lr 2e-4 --full-lr 5e-5
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console

from offsite_fl.config import cache_root
from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.record import RunReport
from offsite_fl.evaluation.rows import Row
from simulations import digits
from simulations.classify import classify
from simulations.demo import demo
from simulations.texts import CHOICES, choices_folder, kinds_folder

HELD_OUT = 400  # labelled examples; classes take turns in the files, so the end of one is a fair sample
HELD_OUT_QUESTIONS = 64  # of each owner: sixteen of each of its four books
console = Console()


def held_out(task: str, folder: Path) -> None:
    """Write the task's files into ``folder``, where there is none; their test is the end of what is to be tuned on."""
    if folder.is_dir():
        return
    final, folder = folder, folder.with_suffix(".part")  # an interrupted one isn't taken for a whole
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if task == "images":
        source = cache_root() / digits.FOLDER
        table = pq.read_table(source / "train.parquet")
        pq.write_table(table.slice(0, len(table) - HELD_OUT), folder / "train.parquet")
        pq.write_table(table.slice(len(table) - HELD_OUT), folder / "test.parquet")
        shutil.copy(source / "public.parquet", folder)
    elif task == "texts":
        (folder / "test.jsonl").write_text("".join(_cut(kinds_folder() / "train.jsonl", folder, HELD_OUT)), "utf-8")
        shutil.copy(kinds_folder() / "public.jsonl", folder)
    else:
        ends = [_cut(choices_folder() / f"{owner}.jsonl", folder, HELD_OUT_QUESTIONS) for owner in CHOICES]
        turns = (line for turn in zip(*ends, strict=True) for line in turn)
        (folder / "test.jsonl").write_text("".join(turns), "utf-8")
        shutil.copy(choices_folder() / "public.txt", folder)
    folder.rename(final)


def _cut(file: Path, folder: Path, count: int) -> list[str]:
    """The last lines of ``file``; the others go into a file of the same name in ``folder``."""
    lines = file.read_text("utf-8").splitlines(keepends=True)
    (folder / file.name).write_text("".join(lines[:-count]), "utf-8")
    return lines[-count:]


def report(task: str, out: Path, rate: str, full_rate: str) -> RunReport:
    """The run with these two rates, from ``out`` where it was done already."""
    if (out / "report.csv").is_file():  # written last
        return RunReport.read(out)
    keys = {"data.folder": str(out.parent.absolute() / "data"), "tune.lr": rate, "baseline.lr": full_rate}
    if task == "choices":
        return demo("smollm2", out.absolute(), keys, task=task)
    return classify(task, out.absolute(), keys)


def table(reports: Sequence[tuple[str, str, RunReport]]) -> str:
    """A Markdown table: what each rate ends at, in per cent."""
    lines = ["| data owners' rate | emulator tuned, % | plug-in, % | rate of full fine-tuning | full fine-tuning, % |"]
    lines.append("|---" * 5 + "|")
    for rate, full_rate, of in reports:
        rows = dict(of.rows)
        tuned, plug_in, full = (_percent(rows.get(key)) for key in ("emulator_tuned", "plug_in", "full_fine_tuning"))
        lines.append(f"| {rate} | {tuned} | {plug_in} | {full_rate} | {full} |")
    return "\n".join(lines)


def _percent(row: Row | None) -> str:
    return "-" if row is None or row.accuracy is None else f"{100 * row.accuracy:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table; 1 with the reason where a run fails."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.rates", description=__doc__)
    parser.add_argument("task", choices=("images", "texts", "choices"))
    parser.add_argument("--lr", action="append", required=True, help="a rate of the data owners")
    parser.add_argument("--full-lr", action="append", required=True, help="one of full fine-tuning; as many as --lr")
    options = parser.parse_args(arguments)
    if len(options.lr) != len(options.full_lr):
        parser.error(f"{len(options.lr)} times --lr, {len(options.full_lr)} times --full-lr: a run tries one of each")
    out = Path("runs") / f"rates-{options.task}"
    try:
        held_out(options.task, out / "data")
        pairs = list(zip(options.lr, options.full_lr, strict=True))
        reports = [(*pair, report(options.task, out / "-".join(pair), *pair)) for pair in pairs]
    except OffsiteError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 1
    console.print(table(reports), soft_wrap=True, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
