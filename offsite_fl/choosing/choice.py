"""The result of a comparison: candidates ranked, one recommended, and the files that tell it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offsite_fl.choosing.kinds import CLASSES
from offsite_fl.choosing.over_seeds import OverSeeds
from offsite_fl.choosing.ranking import ranked, recommend
from offsite_fl.choosing.results import Cell
from offsite_fl.choosing.settings import Settings
from offsite_fl.choosing.standing import Reference, Standing, standing_of
from offsite_fl.choosing.yardstick import ACCURACY, LOSS, Yardstick
from offsite_fl.config import kebab, to_mapping
from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.record import replace_file

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class References:
    """What candidates are set against, in one number: the untuned full model, and what is tuned over seeds."""

    zero_shot: float | None = None
    uncompressed: OverSeeds | None = None
    full_fine_tuning: OverSeeds | None = None

    @classmethod
    def measured_in(cls, reference: Reference, yardstick: Yardstick) -> References:
        """From the cells of the references; nothing where they don't have the number."""
        tuned = [cell.tuned for cell in reference.uncompressed.values() if cell.tuned is not None]
        first = yardstick.read(tuned[0]) if tuned else None
        return cls(
            zero_shot=None if first is None else first.zero_shot,
            uncompressed=_plug_ins(reference.uncompressed, yardstick),
            full_fine_tuning=_plug_ins(reference.full, yardstick),
        )


@dataclass(frozen=True, kw_only=True)
class Choice(References):
    """Candidates, best first, and which one to take.

    ``best`` is None where nothing can be recommended; ``why`` says in a sentence what decided. ``public_loss`` is the
    full model's loss on held-out public data, ``zero_shot`` that on the test data (None where nothing was tuned),
    ``uncompressed`` and ``full_fine_tuning`` are the references' plug-in losses over seeds; ``accuracy`` has the same
    three where there are classes. ``about`` and ``versions`` say what it was made with.
    """

    standings: tuple[Standing, ...]
    best: Standing | None
    why: str
    settings: Settings
    public_loss: float
    middle_bytes: int
    accuracy: References | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    out: Path = Path()

    @classmethod
    def of(
        cls,
        cells: Sequence[Cell],
        settings: Settings,
        *,
        about: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        out: Path = Path(),
    ) -> Choice:
        """Judge the cells of a comparison; the ``uncompressed`` ones must be among them. ``notes`` go to the page."""
        reference = Reference.of(cells)
        if not reference.uncompressed:
            raise DataError("a choice needs the cells of the uncompressed middle, to set candidates against")
        by_candidate: dict[str, list[Cell]] = {}
        for cell in cells:
            if cell.role == "candidate":
                by_candidate.setdefault(cell.candidate, []).append(cell)
        kind, budget = settings.kind, settings.budget
        standings = ranked(
            (standing_of(group, reference, budget, kind.judged_in) for group in by_candidate.values()), kind.judged_in
        )
        first = next(iter(reference.uncompressed.values()))
        assert first.public is not None and first.built is not None
        losses, accuracies = References.measured_in(reference, LOSS), References.measured_in(reference, ACCURACY)
        judged = accuracies if kind.judged_in is ACCURACY else losses
        said = recommend(standings, str(budget), judged.zero_shot, first.public.full_loss, kind)
        failed = [c for c in cells if c.role == "full-fine-tuning" and c.error is not None]
        return cls(
            standings=standings,
            best=said.best,
            why=said.why,
            settings=settings,
            public_loss=first.public.full_loss,
            middle_bytes=first.built.middle_bytes,
            zero_shot=losses.zero_shot,
            uncompressed=losses.uncompressed,
            full_fine_tuning=losses.full_fine_tuning,
            accuracy=None if accuracies.zero_shot is None else accuracies,
            about=about or {},
            versions=versions or {},
            notes=(*notes, *_notes(settings), *(f"full fine-tuning failed, seed {c.seed}: {c.error}" for c in failed)),
            out=out,
        )

    def references(self, yardstick: Yardstick) -> References:
        """Those in one number."""
        return self if yardstick.name == "loss" else self.accuracy or References()

    @property
    def tuned(self) -> bool:
        """Whether candidates were tuned on private data."""
        return self.zero_shot is not None

    def to_dict(self) -> dict[str, Any]:
        """What choose.json holds, in JSON's own types."""
        settings = self.settings
        found: dict[str, Any] = {
            "format": FORMAT,
            "best": self.best and self.best.spec,
            "why": self.why,
            "budget": str(settings.budget),
            "budget_bytes": settings.budget.bytes_of(self.middle_bytes),
            "middle_bytes": self.middle_bytes,
            "references": {
                "public_loss": self.public_loss,
                "zero_shot": self.zero_shot,
                "uncompressed": _plain(self.uncompressed),
                "full_fine_tuning": _plain(self.full_fine_tuning),
                "accuracy": None if self.accuracy is None else dataclasses.asdict(self.accuracy),
            },
            "candidates": [
                {"rank": i, "best": s is self.best} | dataclasses.asdict(s)
                for i, s in enumerate(self.standings, start=1)
            ],
            "settings": self.settings_table(),
            "versions": dict(self.versions),
            "notes": list(self.notes),
        }
        plain: dict[str, Any] = checks.jsonable(found, "choice")
        return plain

    def settings_table(self) -> dict[str, Any]:
        """What the comparison was made with, as a flat table."""
        settings = self.settings
        sizes = {f"{kebab(part)}-{settings.kind.unit}": size for part, size in settings.sizes.items()}
        test = f"test-{settings.kind.unit}"
        table: dict[str, Any] = dict(self.about) | {"budget": str(settings.budget), "seeds": list(settings.seeds)}
        table |= {name: size for name, size in sizes.items() if name != test}
        if settings.kind is CLASSES:
            table["head-from"] = settings.head_from
        if not self.tuned:
            return table
        tune = {key: v for key, v in to_mapping(settings.tune).items() if key not in ("lr", "seed", "progress")}
        table |= {test: sizes[test], "rates": list(settings.rates), "scales": list(settings.scales)}
        if settings.repair:
            table["repair"] = True
        if settings.full_fine_tuning:
            table["full-rates"] = list(settings.full_rates)
        return table | {f"tune.{key}": value for key, value in tune.items()}

    def write(self, folder: str | Path | None = None, *, page: bool = True) -> Path:
        """Write choose.json, choose.csv, choose.md and, with ``page``, choose.html into ``folder`` (None: ``out``).

        The page comes last: if matplotlib is missing (``ConfigError``), the numbers are safe by then.
        """
        from offsite_fl.choosing.table import to_csv, to_markdown

        folder = Path(folder) if folder is not None else self.out
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
            replace_file(folder / "choose.json", text + "\n")
            replace_file(folder / "choose.csv", to_csv(self))
            replace_file(folder / "choose.md", to_markdown(self))
            if page:
                # Here, not above: the page pulls in matplotlib, which is an extra.
                from offsite_fl.choosing.page import render_choice

                replace_file(folder / "choose.html", render_choice(self))
        except OSError as error:
            raise DataError(f"the choice can't be written to {folder}: {error.strerror or error}") from error
        return folder


def _plug_ins(cells: Mapping[int, Cell], yardstick: Yardstick) -> OverSeeds | None:
    found = [yardstick.read(cell.tuned) for cell in cells.values() if cell.tuned is not None]
    known = [numbers.plug_in for numbers in found if numbers is not None]
    return OverSeeds.of(known) if known else None


def _notes(settings: Settings) -> tuple[str, ...]:
    """What a reader of the numbers must know."""
    if settings.kind is not CLASSES:
        return ()
    if settings.head_from == "model":
        return ("The untuned classifier has the head that came with it.",)
    return (
        "The untuned classifier has a head that was made from the calibration examples before any emulator was built: "
        "it answers the class whose mean is nearest. The head is tuned too.",
    )


def _plain(given: OverSeeds | None) -> dict[str, Any] | None:
    return None if given is None else dataclasses.asdict(given)
