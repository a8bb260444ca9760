"""Emulators side by side: what each costs, what a data owner can gain with it, and what the plug-in gains.

    python -m simulations.benchmarks.emulators --model smollm2 --out runs/emulators

One data owner has the texts of all four. For each emulator the adapter is tuned once at each learning rate; of several
the one counts that does best on the data owner's own validation text, by the *emulator's* loss, for that is all that a
data owner sees. The rows ``uncompressed`` (the adapter tuned on the full model's own middle: the most that this adapter
can gain) and ``full-fine-tuning`` stand beside them. Results are kept line by line in ``OUT/results.jsonl``, and what
stands there isn't measured again, so the command can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from offsite_fl.config import TuneConfig
from offsite_fl.data.examples import split_examples
from offsite_fl.data.loader import pad_id_of
from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators import parse_emulator
from offsite_fl.errors import OffsiteError
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.tuning.tune import tune
from simulations.pico import pico_folder
from simulations.texts import BOOK_OWNERS, OWNERS, books_folder, quickstart_folder

# Each takes about an eighth of the middle's bytes, and loses information in its own way.
EIGHTH = (
    "quantize:bits=4,group=0",
    "quantize:bits=4,group=64",
    "low-rank:keep=0.9,targets=q_proj/k_proj/v_proj/o_proj+quantize:bits=4,group=0",
    "low-rank:keep=0.5,mode=sequential+quantize:bits=8",
    "low-rank:keep=0.5,mode=activation+quantize:bits=8",
    "low-rank:keep=0.5,mode=plain+quantize:bits=8",
    "layer-drop:keep=0.5+quantize:bits=8",
    "layer-drop:keep=0.5+distill:steps=40+quantize:bits=8",
)
UNCOMPRESSED, FULL = "uncompressed", "full-fine-tuning"
console = Console()


@dataclass(frozen=True)
class Options:
    """What a comparison is made with."""

    model: str
    out: Path
    emulators: tuple[str, ...]
    rates: tuple[float, ...]
    full_rates: tuple[float, ...]
    tune: TuneConfig
    split: Split
    calibration_tokens: int
    test_tokens: int


class Comparison:
    """The owner, the data, and one line of results for each emulator."""

    def __init__(self, options: Options) -> None:
        small = options.model == "pico"
        data, owners = (books_folder(), BOOK_OWNERS) if small else (quickstart_folder(), OWNERS)
        path = str(pico_folder()) if small else options.model
        self.options = options
        self.owner = ModelOwner.from_pretrained(path, options.split)
        self.test, self.public = data / "test.jsonl", data / "public.txt"
        self.sources = [data / f"{owner}.jsonl" for owner in owners]
        self.train: Dataset | None = None
        self.validation: Dataset | None = None

    def run(self) -> list[dict[str, Any]]:
        """Measure what isn't there yet; all lines in the order asked for."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / "results.jsonl"
        done = _read(path)
        lines = []
        for spec in (UNCOMPRESSED, *self.options.emulators, FULL):
            key = self._key(spec)
            if key not in done:
                console.print(f"[bold]{spec}[/] ...", soft_wrap=True)
                done[key] = {"key": key, "spec": spec, **self._measured(spec)}
                with path.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
                console.print(done[key]["summary"], soft_wrap=True)
            lines.append(done[key])
        return lines

    def _key(self, spec: str) -> str:
        o = self.options
        rates = o.full_rates if spec == FULL else o.rates
        parts = [o.model, str(o.split), spec, o.calibration_tokens, o.test_tokens, rates]
        fields = ("max_steps", "batch_size", "gradient_accumulation", "block_size", "schedule", "seed")
        return json.dumps([*parts, *(getattr(o.tune, name) for name in fields)])

    def _measured(self, spec: str) -> dict[str, Any]:
        emulator = "low-rank:keep=1" if spec in (UNCOMPRESSED, FULL) else spec
        with tempfile.TemporaryDirectory(dir=self.options.out) as scratch:
            bundle = self.owner.make_bundle(
                parse_emulator(emulator),
                Path(scratch) / "bundle",
                calibration=self.public,
                calibration_tokens=self.options.calibration_tokens,
                seed=self.options.tune.seed,
                progress=True,
            )
            tokens, size = self.options.test_tokens, self.options.tune.block_size
            measure = Measure(self.owner, self.test, block_size=size, max_tokens=tokens)
            self._divide(measure)
            if spec == FULL:
                return self._full_fine_tuning(measure)
            report = self.owner.report
            assert report is not None
            found: dict[str, Any] = {
                "build_seconds": report.seconds,
                "bytes_share": report.bytes / report.middle_bytes,
                "flops_share": report.flops_share,
                "verbatim_share": report.verbatim_share,
                "zero_shot": measure.full_zero_shot().loss,
                "emulator_zero_shot": measure.emulator_zero_shot().loss,
                "rates": {},
            }
            for rate in self.options.rates:
                found["rates"][str(rate)] = self._tuned(DataOwner.open(bundle), measure, rate)
        best = min(found["rates"], key=lambda rate: found["rates"][rate]["validation"])
        found |= {"best_rate": best, **found["rates"][best]}
        summary = f"emulator {found['emulator_zero_shot']:.3f} -> {found['emulator_tuned']:.3f}, "
        found["summary"] = summary + f"plug-in {found['zero_shot']:.3f} -> {found['plug_in']:.3f} at lr {best}"
        return found

    def _divide(self, measure: Measure) -> None:
        """A small part of the data owner's text is for choosing the learning rate."""
        if self.train is None:
            pooled = measure.pooled(self.sources)
            self.train, held_out = split_examples(pooled, 0.1, self.options.tune.seed)
            assert held_out is not None
            self.validation = held_out.select(range(min(len(held_out), 16)))

    def _tuned(self, data_owner: DataOwner, measure: Measure, rate: float) -> dict[str, float | None]:
        assert self.train is not None
        config = replace(self.options.tune, lr=rate, schedule_steps=self.options.tune.max_steps)
        started = time.perf_counter()
        update = data_owner.tune(self.train, config, validation=self.validation)
        seconds = time.perf_counter() - started
        return {
            "validation": update.metrics["validation-loss"],
            "emulator_tuned": measure.emulator_tuned(update.tensors).loss,
            "plug_in": measure.plug_in(update.tensors).loss,
            "tune_seconds": seconds,
        }

    def _full_fine_tuning(self, measure: Measure) -> dict[str, Any]:
        assert self.train is not None
        found: dict[str, Any] = {"zero_shot": measure.full_zero_shot().loss, "rates": {}}
        before = {name: value.clone() for name, value in self.owner.model.state_dict().items()}
        for rate in self.options.full_rates:
            config = replace(self.options.tune, lr=rate, schedule_steps=self.options.tune.max_steps)
            done = tune(
                self.owner.model,
                dict(self.owner.model.named_parameters()),
                self.train,
                config,
                validation=self.validation,
                pad_id=pad_id_of(self.owner.tokenizer),
            )
            loss = measure.full_zero_shot().loss
            found["rates"][str(rate)] = {"validation": done.validation_loss, "plug_in": loss}
            self.owner.model.load_state_dict(before)
        best = min(found["rates"], key=lambda rate: found["rates"][rate]["validation"])
        found |= {"best_rate": best, **found["rates"][best]}
        found["summary"] = f"full fine-tuning {found['zero_shot']:.3f} -> {found['plug_in']:.3f} at lr {best}"
        return found


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by key; a last one that was cut off in writing is measured again."""
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {line["key"]: line for line in map(json.loads, whole.splitlines())}


def table_of(lines: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of text, a head first: what docs/emulators.md shows."""
    lines = list(lines)
    full = next(line for line in lines if line["spec"] == FULL)
    gain = full["zero_shot"] - full["plug_in"]
    head = ["emulator", "bytes", "FLOPs", "lr", "emulator zero-shot", "emulator tuned", "plug-in"]
    rows = [[*head, "recovered"]]
    for line in lines:
        recovered = f"{(line['zero_shot'] - line['plug_in']) / gain:.0%}"
        if line["spec"] == FULL:
            rows.append([FULL, "", "", line["best_rate"], "", "", f"{line['plug_in']:.3f}", recovered])
            continue
        cost = [f"{line['bytes_share']:.0%}", f"{line['flops_share']:.0%}"]
        losses = [f"{line[name]:.3f}" for name in ("emulator_zero_shot", "emulator_tuned", "plug_in")]
        rows.append([line["spec"], *cost, line["best_rate"], *losses, recovered])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """A table of GitHub's Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(f"`{c}`" if ":" in c else c for c in row) + " |" for row in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and print its table, on the terminal and as Markdown into ``OUT/table.md``."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.emulators", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, pico, or a folder")
    parser.add_argument("--out", type=Path, default=Path("runs/emulators"))
    parser.add_argument("--emulator", action="append", metavar="SPEC", help="once for each; default: several")
    parser.add_argument("--lr", type=float, action="append", help="once for each rate to try (5e-4)")
    parser.add_argument("--full-lr", type=float, action="append", help="of full fine-tuning (5e-5, 1e-4)")
    parser.add_argument("--split", default="2-2")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--test-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    config = TuneConfig(
        max_steps=given.steps, batch_size=given.batch_size, schedule="cosine", seed=given.seed, progress=True
    )
    options = Options(
        given.model,
        given.out,
        tuple(given.emulator or EIGHTH),
        tuple(given.lr or (5e-4,)),
        tuple(given.full_lr or (5e-5, 1e-4)),
        config,
        Split.parse(given.split),
        given.calibration_tokens,
        given.test_tokens,
    )
    try:
        rows = table_of(Comparison(options).run())
    except OffsiteError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    shown = Table(title=f"{given.model}, {given.steps} steps of {given.batch_size} x {config.block_size} tokens")
    for name in rows[0]:
        shown.add_column(name)
    for row in rows[1:]:
        shown.add_row(*row)
    console.print(shown)
    (given.out / "table.md").write_text(markdown(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
