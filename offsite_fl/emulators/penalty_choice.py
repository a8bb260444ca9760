"""Which penalties are put on which linear of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.free_order import Free
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.penalties import Dim, Kind, Norm, Penalty

Choice = Literal["nuc", "d1", "d2", "none", "nuc/d1", "nuc/d2", "d1/d2", "nuc/d1/d2"]
"""Penalties that are added up."""


def kinds_of(choice: Choice) -> tuple[Kind, ...]:
    """The penalties that ``choice`` adds up.

    >>> kinds_of("nuc/d2"), kinds_of("none")
    (('nuc', 'd2'), ())
    """
    return () if choice == "none" else cast(tuple[Kind, ...], tuple(choice.split("/")))


def has_differences(choice: Choice) -> bool:
    """Whether ``choice`` asks for differences of neighbours."""
    return not {"d1", "d2"}.isdisjoint(kinds_of(choice))


@dataclass(frozen=True)
class PenaltyRules:
    """What is asked for: one choice for linears that are part of an MLP's channels, one for all others.

    ``dims`` are the channels that differences are taken along. Without ``anywhere`` there are differences only along
    channels whose order is free: the outputs of what writes an MLP's channels or attention's values, and the inputs of
    what reads them. A linear without such channels among ``dims`` gets the nuclear norm instead.
    """

    attention: Choice
    mlp: Choice
    dims: tuple[Dim, ...] = ("out",)
    norm: Norm = "l2sq"
    anywhere: bool = False

    @property
    def differences(self) -> bool:
        """Whether differences are asked for at all."""
        return has_differences(self.attention) or has_differences(self.mlp)


def choose_penalties(block: nn.Module, free: Sequence[Free], rules: PenaltyRules) -> dict[str, tuple[Penalty, ...]]:
    """The penalties of each dense linear of ``block`` by path, to be added up; those without any aren't listed.

    ``free`` is what can change places in the block. No difference is taken from one half of a fused gate and up to the
    other, or from one head of values to the next.
    """
    found: dict[str, tuple[Penalty, ...]] = {}
    for path, _ in dense_linears(block):
        owner = next((part for part in free if path in part.paths), None)
        choice = rules.mlp if isinstance(owner, ChannelChain) else rules.attention
        if choice != "none":
            found[path] = _penalties(path, choice, owner, rules)
    return found


def _penalties(path: str, choice: Choice, owner: Free | None, rules: PenaltyRules) -> tuple[Penalty, ...]:
    runs = {} if owner is None else _free_dim(path, owner)
    dims = tuple(dim for dim in rules.dims if rules.anywhere or dim in runs)
    if not dims:
        return (Penalty("nuc"),)
    return tuple(
        Penalty("nuc")
        if kind == "nuc"
        else Penalty(kind, dims, rules.norm, runs=runs.get("out", 1), runs_in=runs.get("in", 1))
        for kind in kinds_of(choice)
    )


def _free_dim(path: str, owner: Free) -> dict[Dim, int]:
    """Which channels of the linear are free, and the number of equal runs that they consist of."""
    if isinstance(owner, ChannelChain):
        return {"out": owner.parts} if path in owner.readers else {"in": 1}
    return {"out": owner.heads} if path == owner.value else {"in": owner.heads * owner.copies}
