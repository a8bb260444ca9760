"""All cells drawn together: what each arm reaches under each condition, which arm leads, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from offsite_fl.choosing.over_seeds import OverSeeds
from offsite_fl.comparing.cells import Arm, Cell, Condition, cells, conditions
from offsite_fl.comparing.results import Measured
from offsite_fl.comparing.settings import GridSettings
from offsite_fl.comparing.statistics import Paired


@dataclass(frozen=True)
class Standing:
    """One arm under one condition over its seeds. Losses and gaps are nats per token, None where there is nothing.

    ``recovered`` is ``(zero-shot - plug-in) / (zero-shot - full fine-tuning)``, seed by seed. ``worst`` and ``spread``
    are over clients, ``down``, ``up``, ``seconds`` and ``peak`` means over seeds.
    """

    arm: Arm
    condition: Condition
    measured: tuple[Measured, ...]
    plug_in: OverSeeds | None
    emulator: OverSeeds | None
    gap: OverSeeds | None
    recovered: OverSeeds | None
    worst: OverSeeds | None
    spread: OverSeeds | None
    down: float | None
    up: float | None
    seconds: float | None
    peak: float | None
    errors: tuple[str, ...] = ()

    @property
    def rank(self) -> tuple[bool, float]:
        """Best first; what diverged or failed last."""
        good = self.plug_in is not None and math.isfinite(self.plug_in.mean)
        return (not good, self.plug_in.mean if good and self.plug_in is not None else 0.0)


@dataclass(frozen=True)
class Lead:
    """The best two strategies over all conditions and seeds, and the test between them. None: there is one alone."""

    best: Arm
    loss: float
    second: Arm | None
    paired: Paired | None


@dataclass(frozen=True)
class Summary:
    """Everything that the page and the tables tell.

    ``by_condition`` has the standings of each condition, best first, references among them; ``overall`` each
    strategy's mean loss over the pairs of condition and seed that all of them have, best first.
    """

    settings: GridSettings
    by_condition: dict[Condition, list[Standing]]
    overall: list[tuple[Arm, OverSeeds]]
    lead: Lead | None
    zero_shot: float | None
    failed: list[Measured]
    missing: int

    @classmethod
    def of(cls, settings: GridSettings, measured: Sequence[Measured]) -> Summary:
        """From the cells of the grid, failed ones included; others are left out."""
        wanted = cells(settings)
        known = {found.cell: found for found in measured}
        good = [known[cell] for cell in wanted if cell in known and known[cell].error is None]
        zero = next((found.zero_shot for found in good if found.zero_shot is not None), None)
        table = {condition: _standings(condition, wanted_arms(settings), known, good, zero)
                 for condition in conditions(settings)}  # fmt: skip
        overall, blocks = _overall(good)
        return cls(
            settings,
            table,
            overall,
            _lead(overall, blocks),
            zero,
            [known[cell] for cell in wanted if cell in known and known[cell].error is not None],
            sum(cell not in known for cell in wanted),
        )


def wanted_arms(settings: GridSettings) -> list[Arm]:
    """Every arm of a grid, references first."""
    return list(dict.fromkeys(cell.arm for cell in cells(settings)))


def _standings(
    condition: Condition,
    arms: Iterable[Arm],
    known: dict[Cell, Measured],
    good: Sequence[Measured],
    zero: float | None,
) -> list[Standing]:
    full = {
        found.cell.seed: found.last.plug_in
        for found in good
        if found.cell.arm.role == "full-fine-tuning" and found.cell.condition.holds(condition) and found.last
    }
    standings = []
    for arm in arms:
        own = [m for m in known.values() if m.cell.arm == arm and m.cell.condition.holds(condition)]
        if own:
            standings.append(_standing(arm, condition, own, zero, full))
    return sorted(standings, key=lambda standing: standing.rank)


def _standing(
    arm: Arm, condition: Condition, own: Sequence[Measured], zero: float | None, full: dict[int, float]
) -> Standing:
    good = tuple(m for m in own if m.error is None and m.last is not None)

    def over(value: Callable[[Measured], float | None]) -> OverSeeds | None:
        values = [found for m in good if (found := value(m)) is not None]
        return OverSeeds.of(values) if values else None

    def mean(value: Callable[[Measured], float | None]) -> float | None:
        found = over(value)
        return None if found is None else found.mean

    tuned = arm.role != "zero-shot"
    return Standing(
        arm,
        condition,
        good,
        plug_in=over(lambda m: m.last.plug_in if m.last else None),
        emulator=over(lambda m: m.last.emulator if m.last else None),
        gap=over(lambda m: m.gap),
        recovered=over(lambda m: recovered(m, zero, full)) if tuned else None,
        worst=over(lambda m: m.worst_client),
        spread=over(lambda m: m.spread),
        down=mean(lambda m: float(m.down)) if tuned else None,
        up=mean(lambda m: float(m.up)) if tuned else None,
        seconds=mean(lambda m: m.client_seconds) if tuned else None,
        peak=mean(lambda m: m.peak_bytes),
        errors=tuple(m.error for m in own if m.error is not None),
    )


def recovered(found: Measured, zero: float | None, full: dict[int, float]) -> float | None:
    """The share of full fine-tuning's gain with the same seed; None where that isn't known or gains nothing."""
    best = full.get(found.cell.seed)
    if zero is None or best is None or found.last is None or not zero > best:
        return None
    return (zero - found.last.plug_in) / (zero - best)


Block = tuple[Condition, int]


def _overall(good: Sequence[Measured]) -> tuple[list[tuple[Arm, OverSeeds]], dict[Arm, dict[Block, float]]]:
    """Strategies by their mean over the blocks that all of them have. One that diverged somewhere has none there."""
    blocks: dict[Arm, dict[Block, float]] = {}
    for found in good:
        if found.cell.arm.role == "strategy" and found.last is not None and math.isfinite(found.last.plug_in):
            blocks.setdefault(found.cell.arm, {})[found.cell.condition, found.cell.seed] = found.last.plug_in
    if not blocks:
        return [], {}
    most = max(len(own) for own in blocks.values())
    whole = {arm: own for arm, own in blocks.items() if len(own) == most}
    shared = set.intersection(*(set(own) for own in whole.values()))
    if not shared:
        return [], {}
    means = [(arm, OverSeeds.of(own[block] for block in own if block in shared)) for arm, own in whole.items()]
    return sorted(means, key=lambda pair: pair[1].mean), {
        arm: {block: loss for block, loss in own.items() if block in shared} for arm, own in whole.items()
    }


def _lead(overall: Sequence[tuple[Arm, OverSeeds]], blocks: dict[Arm, dict[Block, float]]) -> Lead | None:
    if not overall:
        return None
    best, loss = overall[0]
    if len(overall) == 1:
        return Lead(best, loss.mean, None, None)
    second = overall[1][0]
    differences = tuple(blocks[second][block] - blocks[best][block] for block in blocks[best])
    return Lead(best, loss.mean, second, Paired(differences))
