"""How many bytes an emulator may hold: the two budgets that every method understands, and whether it was met.

``keep`` is a share of the bytes of what a method is given (alone, the middle; in a chain, what the methods before it
left), ``bytes`` a size such as ``"40MB"``. Bytes are those of the stored tensors in the dtypes that they have, so a
packed weight counts as what it takes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor, nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, EmulatorMethod
from offsite_fl.sizes import parse_bytes

# How far the bytes may be from those that were asked for, as a share of the latter.
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
        """Compress to the budget; where it is missed by more than 2 % of it the result carries a note that says why."""
        budget = self.budget(emulator)
        built = self.reduce(emulator, context, budget)
        return built if budget is None else held_against(budget, emulator, built, self.name, self._why_missed())

    def _why_missed(self) -> str:
        return self.grain

    @abstractmethod
    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Return an emulator of about ``budget`` bytes; neither ``emulator`` nor the full model is changed."""


def held_against(budget: int, given: Emulator, built: Emulator, name: str, why: str) -> Emulator:
    """``built``, which method ``name`` made of ``given``, with a note if it is more than 2 % of ``budget`` off."""
    before, held = emulator_bytes(given), emulator_bytes(built)
    if abs(held - budget) <= TOLERANCE * budget:
        return built
    note = f"{name} was asked for {budget / before:.1%} of the bytes and holds {held / before:.1%}"
    return replace(built, notes=(*built.notes, f"{note}: {why}" if why else note))


def largest_share(held: Callable[[float], int], budget: int) -> float:
    """The largest share from 0 to 1 at which ``held``, which never falls as it grows, is at most ``budget``.

    0 where even that holds too much.

    >>> largest_share(lambda share: int(100 * share), 40) // 0.001
    409.0
    """
    if held(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if held(middle) <= budget else (low, middle)
    return low


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
