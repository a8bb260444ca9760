"""Hand-made cells: what a comparison would have measured, with numbers that are easy to reckon with."""

from __future__ import annotations

from typing import Any

from offsite_fl.choosing.results import Built, Cell, OnPublicText, Role, Tuned


def cell(
    spec: str = "layer-drop:keep=0.5",
    seed: int = 0,
    *,
    role: Role = "candidate",
    candidate: str | None = None,
    bytes: int = 500,
    cosine: float = 0.5,
    public_loss: float = 4.0,
    tuned: tuple[float, float] | None = (4.5, 3.5),
    zero_shot: float = 4.0,
    error: str | None = None,
    **more: Any,
) -> Cell:
    """A cell of a middle of 1,000 bytes; ``tuned`` is the tuned emulator's loss and the plug-in's."""
    key = f"{role} {spec} {seed}"
    if error is not None:
        return Cell(key, role, candidate or spec, spec, seed, error=error)
    built = Built(bytes, 1000, 0.4, 0.5, 2.0, None, ())
    public = OnPublicText(3.0, public_loss, 0.1, cosine, 2.0, (cosine, cosine), (2.0, 2.0))
    found = None
    if tuned is not None:
        found = Tuned(1e-3, (), zero_shot, 5.0, tuned[0], tuned[1], more.get("scales", ()), 1.0)
    return Cell(key, role, candidate or spec, spec, seed, built, public, found)


def references(seeds: tuple[int, ...] = (0,), *, adapter: float = 3.0, full: float | None = 2.0) -> list[Cell]:
    """The uncompressed middle and full fine-tuning for each seed; the untuned model has 4.0."""
    cells = [cell("uncompressed", s, role="uncompressed", tuned=(adapter, adapter)) for s in seeds]
    if full is not None:
        cells += [cell("full-fine-tuning", s, role="full-fine-tuning", tuned=(full, full)) for s in seeds]
    return cells
