"""The cells of a grid: one federation, or one of the references it is set against, with one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from offsite_fl.comparing.settings import Baseline, GridSettings

Role = Literal["strategy", Baseline]
LABELS: dict[Role, str] = {
    "zero-shot": "untuned full model",
    "alone": "each client alone",
    "pooled": "all data in one place",
    "uncompressed": "adapter on the uncompressed model",
    "full-lora": "LoRA on the full model",
    "full-fine-tuning": "full fine-tuning, all data in one place",
}


@dataclass(frozen=True)
class Condition:
    """What arms are compared under. None in a reference means that it is the same under all of them."""

    partition: str | None = None
    clients: int | None = None
    fraction: float | None = None
    attack: str | None = None

    def holds(self, other: Condition) -> bool:
        """Whether what was measured under this condition counts under the full condition ``other`` too."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(mine is None or mine == theirs for mine, theirs in pairs)


@dataclass(frozen=True, order=True)
class Arm:
    """What is compared: a strategy with an emulator, or a reference (of which some have no emulator)."""

    role: Role
    strategy: str = ""
    emulator: str = ""

    @property
    def label(self) -> str:
        """As the tables name it, without the emulator."""
        return self.strategy if self.role == "strategy" else LABELS[self.role]


@dataclass(frozen=True)
class Cell:
    """One arm under one condition with one seed."""

    arm: Arm
    condition: Condition
    seed: int

    @property
    def label(self) -> str:
        """One line for whoever watches."""
        found = [self.arm.label, self.arm.emulator, self.condition.partition or ""]
        if self.condition.attack:
            found.append(f"under {self.condition.attack}")
        return ", ".join(part for part in found if part) + f", seed {self.seed}"


def conditions(settings: GridSettings) -> Iterator[Condition]:
    """The full conditions of a grid, in its own order."""
    axes = settings.grid
    for partition in axes.partitions:
        for clients in axes.clients:
            for fraction in axes.fractions:
                for attack in axes.attacks:
                    yield Condition(partition, clients, fraction, attack)


def cells(settings: GridSettings) -> list[Cell]:
    """All cells, one seed after the other, so that an early look at the results shows every arm."""
    found: list[Cell] = []
    for number, seed in enumerate(settings.grid.seeds):
        if number == 0 and "zero-shot" in settings.baselines.run:
            found.append(Cell(Arm("zero-shot"), Condition(), 0))
        found += _references(settings, seed)
        for condition in conditions(settings):
            for emulator in settings.grid.emulators:
                for strategy in settings.grid.strategies:
                    found.append(Cell(Arm("strategy", strategy, emulator), condition, seed))
    return list(dict.fromkeys(found))


def _references(settings: GridSettings, seed: int) -> Iterator[Cell]:
    """What is the same under several conditions is one cell. References are honest: no attack."""
    wanted, axes = settings.baselines.run, settings.grid
    for clients in axes.clients:
        pooled = Condition(clients=clients)
        if "full-fine-tuning" in wanted:
            yield Cell(Arm("full-fine-tuning"), pooled, seed)
        if "pooled" in wanted:
            yield from (Cell(Arm("pooled", "", emulator), pooled, seed) for emulator in axes.emulators)
        for partition in axes.partitions:
            here = Condition(partition, clients)
            if "alone" in wanted:
                yield from (Cell(Arm("alone", "", emulator), here, seed) for emulator in axes.emulators)
            for fraction in axes.fractions:
                federated = Condition(partition, clients, fraction)
                for role in ("uncompressed", "full-lora"):
                    if role in wanted:
                        yield Cell(Arm(role, "fedavg"), federated, seed)
