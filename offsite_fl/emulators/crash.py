"""CRaSh (arXiv 2310.15477): cluster the blocks, remove all but the centres, share these with the places left empty."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from offsite_fl.config import check_choices
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, register
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.emulators.choice import BlockChoice, keep_places
from offsite_fl.emulators.placement import Neighbours, Pooling, spread_ranks
from offsite_fl.emulators.sharing import Sharing, stand_ins
from offsite_fl.errors import EmulatorError
from offsite_fl.models.split import Split
from offsite_fl.sizes import human_bytes


@register("crash")
@dataclass(frozen=True)
class Crash(BlockChoice):
    """Keep the centre of each cluster of like neighbours and run it in its neighbours' places (CRaSh).

    arXiv 2310.15477. ``Z_l`` is what block ``l`` of the full model hands on, pooled over the tokens of each calibration
    example (``pooling``; ``mean-weighted``: ``sum_t t * h_t / sum_t t`` over real tokens). Adjacent clusters with the
    largest linear ``CKA(Z_last, Z_first)`` at their boundary are merged until as many are left as blocks are kept; a
    cluster ``c`` keeps ``c[len(c) // 2]``.

    ``sharing`` gives the emulator its depth back: in a removed place runs the nearest kept block, the left one only if
    it is strictly nearer. A block that runs at several places is stored once, but computed at each; data owners see how
    deep the model is. With ``all`` the nearest may be an adapter block, of whose initial weights a frozen copy runs
    there, untouched by tuning: each such copy is one block more in the bundle, counted where ``keep`` is a share or
    ``bytes`` is given and noted where it is a number. ``frozen-only`` prefers the frozen one of the two kept
    neighbours. ``none`` drops removed places.

    ``placement`` is where the adapter lies. ``sandwich``: wherever the split has it; only the middle is clustered,
    never across an adapter block. ``spread``, the paper's: all blocks are clustered, and of the ``K`` centres those
    with rank ``ceil(i * (K - 1) / (m - 1))`` must be the ``m`` adapter blocks; ``spread_split`` finds the split.

    ``keep`` is a number of middle blocks (1 or more) or, below 1, the share of the bytes that stays, so the paper's 12
    of OPT-1.3B with 4 adapter blocks is ``keep=8``. Kept blocks leave the owner's house verbatim.
    """

    pooling: Pooling = "mean-weighted"
    sharing: Sharing = "all"
    placement: Literal["sandwich", "spread"] = "sandwich"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)

    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """The centres, and what runs in the other places; blocks that stay are the same modules."""
        chosen = self._chosen(emulator, context, budget)
        self._check_adapter(chosen, context)
        kept = keep_places(emulator, chosen.kept)
        copies = [EmulatorBlock(_frozen_copy(context.block(index)), index) for index in chosen.copied]
        slots = kept.layout | {block.origin: len(kept.blocks) + n for n, block in enumerate(copies)}
        filled = {place: slots[stand_in] for place, stand_in in chosen.stand_ins.items()}
        built = Emulator([*kept.blocks, *copies], kept.layout | filled)
        return built if budget is not None or not copies else replace(built, notes=(_cost(copies),))

    def _why_missed(self) -> str:
        return self.grain if self.sharing == "none" else f"{self.grain}, and copies of adapter blocks count"

    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """The centres of ``count`` clusters."""
        return self._choice(self._neighbours(emulator, context), count, context).kept

    def _neighbours(self, emulator: Emulator, context: Context) -> Neighbours:
        if self.placement == "spread":
            return Neighbours(context, sorted({*emulator.positions, *context.adapter}), self.pooling)
        return Neighbours(context, emulator.positions, self.pooling, between=context.adapter)

    def _chosen(self, emulator: Emulator, context: Context, budget: int | None) -> _Choice:
        """The choice for the number of blocks that ``keep`` names, or the one whose bytes are nearest to ``budget``."""
        near, places = self._neighbours(emulator, context), len(emulator.positions)
        least = near.stretches
        if (budget is None and not least <= self.keep <= places) or least > places:
            why = "" if least == 1 else f" (one for each of the {least} parts that adapter blocks cut the middle into)"
            raise EmulatorError(
                f"crash can't keep {self.keep} of {places} middle blocks: keep must lie between {least}{why} and "
                f"{places}"
            )
        if budget is None:
            return self._choice(near, int(self.keep), context)
        choices = [self._choice(near, count, context) for count in range(least, places + 1)]
        return min(choices, key=lambda choice: abs(choice.bytes(emulator, context) - budget))

    def _choice(self, near: Neighbours, count: int, context: Context) -> _Choice:
        if self.placement == "sandwich":
            kept, adapter = near.centres(count), context.adapter
        else:
            centres = near.centres(count + len(context.adapter))
            adapter = tuple(centres[rank] for rank in spread_ranks(len(centres), len(context.adapter)))
            kept = tuple(centre for centre in centres if centre not in adapter)
        removed = [place for place in near.positions if place not in kept and place not in adapter]
        return _Choice(kept, adapter, stand_ins(removed, kept, adapter, self.sharing))

    def _check_adapter(self, chosen: _Choice, context: Context) -> None:
        if chosen.adapter == context.adapter:
            return
        kept, adapter = len(chosen.kept) + len(chosen.adapter), len(chosen.adapter)
        raise EmulatorError(
            f"crash with placement=spread keeps {kept} blocks, of which on this text the adapter must be "
            f"{Split(at=chosen.adapter)}, but the split is {Split(at=context.adapter)}: use that split (--split "
            f"spread={kept}/{adapter}, or spread_split, finds it), or placement=sandwich"
        )


@dataclass(frozen=True)
class _Choice:
    """Middle places that stay, the adapter beside them, and the place whose block runs in each removed place."""

    kept: tuple[int, ...]
    adapter: tuple[int, ...]
    stand_ins: dict[int, int]

    @property
    def copied(self) -> tuple[int, ...]:
        """The adapter blocks that run in removed places as well."""
        return tuple(sorted(set(self.stand_ins.values()) & set(self.adapter)))

    def bytes(self, emulator: Emulator, context: Context) -> int:
        """What the emulator of this choice holds; for another split than the context's about so much."""
        kept = (emulator.at(place) if place in emulator.layout else context.block(place) for place in self.kept)
        return stored_bytes([*kept, *(context.block(index) for index in self.copied)])


def _frozen_copy(block: nn.Module) -> nn.Module:
    """Values of its own, for the adapter's change when an update is plugged in."""
    return copy.deepcopy(block).requires_grad_(False)


def _cost(copies: Iterable[EmulatorBlock]) -> str:
    listed = list(copies)
    blocks = ", ".join(str(block.origin) for block in listed)
    return (
        f"crash runs frozen copies of adapter block(s) {blocks} in removed places: {len(listed)} block(s), "
        f"{human_bytes(stored_bytes(block.module for block in listed))}, beside those that keep names"
    )
