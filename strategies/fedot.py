"""FedOT: what the literature calls federated offsite-tuning, the baseline that other ways are held against."""

from __future__ import annotations

from typing import Any

from offsite_fl.config import check

from .preset import Preset, Setup

DISTILLED = ("distill", "scaleot")  # the methods that train an emulator towards the full middle


class FedOT(Preset):
    """Federated offsite-tuning as the baseline has it: both ends tuned, an emulator distilled once, weighted average.

    Averages as FedAvg does and asks for nothing else in its messages; it holds the rest of the set-up to the baseline
    of FedBiOT's paper (arXiv 2406.17706), so that a run under this name is one. ``placement`` is ``both-ends`` (the
    adapter are the first and the last blocks, as with ``split = "2-2"``) or ``any``; with ``distilled`` the emulator's
    method must train it, for instance ``layer-drop:keep=0.8+distill:w-kd=0.9,w-lm=0.1``. ``options`` are FedAvg's.
    """

    def __init__(self, *, placement: str = "both-ends", distilled: bool = True, **options: Any) -> None:
        super().__init__(**options)
        check(placement in ("both-ends", "any"), f"fedot: placement must be both-ends or any, got {placement!r}")
        self.placement, self.distilled = placement, distilled

    def fits(self, setup: Setup) -> None:
        """See :class:`Preset`."""
        middle = setup.split.middle(setup.depth)
        ends = {0, setup.depth - 1} <= set(setup.adapter) and middle[-1] - middle[0] + 1 == len(middle)
        check(
            self.placement == "any" or ends,
            f"fedot tunes the first and the last blocks, but the split is {setup.split}: set it to 2-2, or take "
            "fedot:placement=any",
        )
        methods = [part.partition(":")[0].strip() for part in setup.emulator.split("+")]
        check(
            not self.distilled or any(method in DISTILLED for method in methods),
            f"fedot's emulator is distilled once, but this one is {setup.emulator!r}: add +distill to it, or take "
            "fedot:distilled=false",
        )
