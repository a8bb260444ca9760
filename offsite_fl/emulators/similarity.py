"""Drop the blocks that change the hidden state least, as one look at the full model on public text shows them."""

from __future__ import annotations

from dataclasses import dataclass

from offsite_fl.emulators.base import Context, Emulator, register
from offsite_fl.emulators.choice import BlockChoice
from offsite_fl.emulators.cka import entering_state, linear_cka, pooled_states


@register("similarity")
@dataclass(frozen=True)
class Similarity(BlockChoice):
    """Drop the blocks whose output is most like their input, by linear CKA on calibration text; a control.

    Input and output of a block are pooled over the tokens of each calibration example, later tokens weighing more, and
    compared by linear CKA (both as in CRaSh, arXiv 2310.15477). The full model is looked at once: what a block is worth
    after others were dropped isn't asked. ``keep`` is a number of blocks (1 or more) or, below 1, the share of the
    bytes that stays. Kept blocks leave the owner's house verbatim.
    """

    def choose(self, emulator: Emulator, count: int, context: Context) -> tuple[int, ...]:
        """The ``count`` places at which the full model's block changes most; of equal ones the first."""
        alike = block_similarity(context)
        ranked = sorted(emulator.positions, key=lambda position: alike[position])
        return tuple(sorted(ranked[:count]))


def block_similarity(context: Context) -> list[float]:
    """Linear CKA between what enters and what leaves each block of the full model, in forward order."""
    behind = pooled_states(context)
    before = [entering_state(context), *behind]
    return [linear_cka(x, y) for x, y in zip(before, behind, strict=False)]
