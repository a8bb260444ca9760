"""How many bytes an emulator may hold: the two budgets that every method understands, and whether it was met.

``keep`` is a share of the bytes of what a method is given (alone, the middle; in a chain, what the methods before it
left), ``bytes`` a size such as ``"40MB"``. Bytes are those of the stored tensors in the dtypes that they have, so a
packed weight counts as what it takes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor, nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, EmulatorMethod
from offsite_fl.sizes import parse_bytes

# How far the bytes may be from those that were asked for, as a share of what the method was given.
TOLERANCE = 0.02


@dataclass(frozen=True)
class BudgetedMethod(EmulatorMethod):
    """A method that makes an emulator of a size that its user names.

    ``keep``: share of the bytes that stays; ``bytes``, where it is given, says how many instead.
    """

    keep: float = 0.5
    bytes: str = field(default="", kw_only=True)

    grain: ClassVar[str] = ""
    """Why a budget can be missed, said in the note when it is; for example "blocks are kept whole"."""

    def __post_init__(self) -> None:
        check(0 < self.keep <= 1, f"{self.name} keep = {self.keep!r} must be a share above 0 and at most 1")
        self._check_bytes()

    def _check_bytes(self) -> None:
        check(not self.bytes or parse_bytes(self.bytes) > 0, f"{self.name} bytes = {self.bytes!r} must be above 0")

    def budget(self, emulator: Emulator) -> int | None:
        """Bytes that the result should hold; None where the options fix it in another way."""
        return parse_bytes(self.bytes) if self.bytes else round(self.keep * emulator_bytes(emulator))

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Compress to the budget; where it is missed by more than 2 % the result carries a note that says why."""
        budget = self.budget(emulator)
        built = self.reduce(emulator, context, budget)
        given, held = emulator_bytes(emulator), emulator_bytes(built)
        if budget is None or abs(held - budget) <= TOLERANCE * given:
            return built
        return replace(built, notes=(*built.notes, self._missed(budget / given, held / given)))

    def _missed(self, asked: float, held: float) -> str:
        return missed_note(self.name, asked, held, self.grain)

    @abstractmethod
    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Return an emulator of about ``budget`` bytes; neither ``emulator`` nor the full model is changed."""


def missed_note(name: str, asked: float, held: float, why: str = "") -> str:
    """What an emulator's notes say of a missed budget; ``asked`` and ``held`` are shares of what ``name`` was given."""
    return f"{name} was asked for {asked:.1%} of the bytes and holds {held:.1%}" + (f": {why}" if why else "")


def emulator_bytes(emulator: Emulator) -> int:
    """Bytes of an emulator's blocks, each counted once."""
    return stored_bytes(block.module for block in emulator.blocks)


def stored_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and persistent buffers, tied ones once: what writing the modules takes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _stored(modules))


def count_parameters(modules: Iterable[nn.Module]) -> int:
    """Number of parameter elements, tied ones once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def _stored(modules: Iterable[nn.Module]) -> list[Tensor]:
    tensors: dict[int, Tensor] = {}
    for module in modules:
        tensors.update({id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()})
    return list(tensors.values())
