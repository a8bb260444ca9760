"""Hand-made cells: what a comparison would have measured, with numbers that are easy to reckon with."""

from __future__ import annotations

from typing import Any

from offsite_fl.choosing.results import Built, Cell, Numbers, OnPublicText, Role, Tuned


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
        beside = {name: more[name] for name in ("without_repair", "accuracy") if name in more}
        found = Tuned(1e-3, (), zero_shot, 5.0, tuned[0], tuned[1], more.get("scales", ()), 1.0, **beside)
    return Cell(key, role, candidate or spec, spec, seed, built, public, found)


def right(zero_shot: float, emulator_tuned: float, plug_in: float) -> Numbers:
    """Accuracies of a cell."""
    return Numbers(zero_shot, 0.4, emulator_tuned, plug_in)


def references(
    seeds: tuple[int, ...] = (0,), *, adapter: float = 3.0, full: float | None = 2.0, classes: bool = False
) -> list[Cell]:
    """The uncompressed middle and full fine-tuning for each seed; the untuned model has 4.0.

    Of ``classes`` the untuned model has 50 % right, the tuned adapter 90 %, full fine-tuning 100 %.
    """
    more = [{"accuracy": right(0.5, best, best)} if classes else {} for best in (0.9, 1.0)]
    cells = [cell("uncompressed", s, role="uncompressed", tuned=(adapter, adapter), **more[0]) for s in seeds]
    if full is not None:
        cells += [cell("full-fine-tuning", s, role="full-fine-tuning", tuned=(full, full), **more[1]) for s in seeds]
    return cells
