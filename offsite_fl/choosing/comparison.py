"""The loop: every candidate with every seed, one cell after the other, each kept as soon as it is there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import rich
from rich.text import Text

from offsite_fl.bundle import fingerprint
from offsite_fl.choosing.bench import Bench
from offsite_fl.choosing.candidates import fill
from offsite_fl.choosing.parts import Parts
from offsite_fl.choosing.results import Cell, Role
from offsite_fl.choosing.settings import Settings
from offsite_fl.choosing.store import CellStore
from offsite_fl.choosing.yardstick import Yardstick
from offsite_fl.config import to_mapping
from offsite_fl.emulators import EmulatorMethod, parse_emulator
from offsite_fl.errors import OffsiteError
from offsite_fl.owner import ModelOwner

# Raised when a cell's numbers come to mean something else, so that old ones are measured anew.
FORMAT = 1
# They say where and how loudly, not what comes out; rate and seed are given apart.
_NOT_IN_KEY = ("lr", "seed", "device", "progress", "validation-share")


class Comparison:
    """All cells of one comparison, in the order in which they are measured."""

    def __init__(self, owner: ModelOwner, settings: Settings, parts: Parts, out: Path, progress: bool = False) -> None:
        self.owner, self.settings, self.out, self.progress = owner, settings, out, progress
        self.tuned = parts.private is not None
        self.bench = Bench(owner, settings, parts, progress)
        self.store = CellStore(out / "cells.jsonl")
        self._common = {
            "format": FORMAT,
            "model": fingerprint(owner.model.state_dict()),
            "split": str(owner.split),
            "texts": parts.digests(),
            "tune": self._tuning() if self.tuned else None,
        } | ({"head": owner.head} if owner.head else {})

    def _tuning(self) -> dict[str, Any]:
        kept = {k: v for k, v in to_mapping(self.settings.tune).items() if k not in _NOT_IN_KEY}
        return kept | {"scales": self.settings.scales}

    def run(self) -> list[Cell]:
        """Measure what isn't there yet; all cells, references first. An interruption loses at most one of them."""
        plan = list(self._plan())
        cells = []
        self._say(
            f"{len(plan)} measurements of {len(self.settings.candidates)} candidates; it can be stopped at any time, "
            f"what is in {self.store.path} isn't measured again. Methods that train take longest (see --candidate).",
            "dim",
        )
        for number, (role, candidate, seed) in enumerate(plan, start=1):
            spec = fill(candidate, self.settings.budget)
            method = parse_emulator(spec) if role == "candidate" else None
            key = self._key(role, method, spec, seed)
            cell = self.store.get(key)
            if cell is None:
                blank = Cell(key, role, candidate, spec, seed)
                self._say(f"[{number}/{len(plan)}] {spec}, seed {seed} ...", "bold")
                cell = self._measured(blank, method)
                self.store.add(cell)
                self._say(_outcome(cell, self.settings.kind.judged_in), "dim")
                if cell.error is None:
                    shutil.rmtree(self._workdir(cell), ignore_errors=True)
            # A key names the numbers, not the wording that asked for them.
            cells.append(dataclasses.replace(cell, candidate=candidate, spec=spec))
        with suppress(OSError):  # none, or with what a failed cell goes on from
            (self.out / "work").rmdir()
        return cells

    def _plan(self) -> Iterator[tuple[Role, str, int]]:
        """One seed after the other, so that an early look at the file shows all candidates."""
        for seed in self.settings.seeds:
            yield "uncompressed", "uncompressed", seed
            if self.tuned and self.settings.full_fine_tuning:
                yield "full-fine-tuning", "full-fine-tuning", seed
            for candidate in self.settings.candidates:
                yield "candidate", candidate, seed

    def _key(self, role: Role, method: EmulatorMethod | None, spec: str, seed: int) -> str:
        """SHA-256 over everything that the cell's numbers depend on. ``repr`` of a method has its defaults too."""
        rates: Sequence[float] = self.settings.full_rates if role == "full-fine-tuning" else self.settings.rates
        own = {"role": role, "method": repr(method) if method else spec, "seed": seed}
        own |= {"rates": rates if self.tuned else None}
        if self.settings.repair and role == "candidate":
            own["repair"] = True
        return hashlib.sha256(json.dumps(self._common | own, sort_keys=True).encode()).hexdigest()

    def _measured(self, blank: Cell, method: EmulatorMethod | None) -> Cell:
        """``blank`` with its numbers, or with what went wrong: one candidate's fault must not cost the others."""
        try:
            return self._numbers(blank, method)
        except Exception as error:  # whatever a method raises, a bug of its own included; an interruption passes
            if blank.role == "uncompressed":  # without it no candidate can be judged
                raise
            if not isinstance(error, OffsiteError):
                self._keep_traceback(blank)
            return dataclasses.replace(blank, error=_reason(error))

    def _numbers(self, blank: Cell, method: EmulatorMethod | None) -> Cell:
        if blank.role == "full-fine-tuning":
            return dataclasses.replace(blank, tuned=self.bench.full_fine_tuning(blank.seed))
        if method is None:
            built, public, tuned = self.bench.uncompressed(blank.seed)
        else:
            built, public, tuned = self.bench.candidate(method, blank.seed, self._workdir(blank))
        return dataclasses.replace(blank, built=built, public=public, tuned=tuned)

    def _workdir(self, cell: Cell) -> Path:
        """Where the methods of one cell keep what they need to resume; it goes once the cell is there."""
        return self.out / "work" / cell.key[:16]

    def _keep_traceback(self, cell: Cell) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "errors.log").open("a", encoding="utf-8") as file:
            file.write(f"{cell.spec}, seed {cell.seed}\n{traceback.format_exc()}\n")

    def _say(self, text: str, style: str) -> None:
        if self.progress:
            rich.get_console().print(Text(text, style=style), soft_wrap=True)


def _reason(error: Exception) -> str:
    """One line of what went wrong; of what isn't the project's own error also the kind."""
    text = " ".join(str(error).split())
    if isinstance(error, OffsiteError):
        return text
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"


def _outcome(cell: Cell, by: Yardstick) -> str:
    """One line for whoever watches."""
    if cell.error is not None:
        return f"failed: {cell.error}"
    parts = [] if cell.public is None else [f"gradient cosine {cell.public.cosine:.3f}"]
    found = None if cell.tuned is None else by.read(cell.tuned)
    if cell.tuned is not None and found is not None:
        if found.emulator_tuned is not None and found.emulator_zero_shot is not None:
            parts.append(f"emulator {by.told(found.emulator_zero_shot)} -> {by.told(found.emulator_tuned)}")
        parts.append(f"full model {by.told(found.zero_shot)} -> {by.told(found.plug_in)} at lr {cell.tuned.rate:g}")
    return ", ".join(parts)
