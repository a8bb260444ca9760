"""Which penalty is put on which linear of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.penalties import Dim, Kind, Norm, Penalty
from offsite_fl.errors import EmulatorError

Choice = Literal["nuc", "d1", "d2", "none"]


@dataclass(frozen=True)
class PenaltyRules:
    """What is asked for: one penalty for linears that are part of an MLP's channels, one for all others.

    ``dims`` are the channels that differences are taken along. Without ``anywhere`` there are differences only along
    channels whose order is free: the outputs of what writes an MLP's channels and the inputs of what reads them. A
    linear of the MLP without such channels among ``dims`` gets the nuclear norm.
    """

    attention: Choice
    mlp: Choice
    dims: tuple[Dim, ...] = ("out",)
    norm: Norm = "l2sq"
    anywhere: bool = False

    @property
    def differences(self) -> bool:
        """Whether differences are asked for along an MLP's channels."""
        return self.mlp in ("d1", "d2")


def choose_penalties(block: nn.Module, chains: Sequence[ChannelChain], rules: PenaltyRules) -> dict[str, Penalty]:
    """The penalty of each dense linear of ``block`` by path; those without one aren't listed.

    ``EmulatorError`` if differences are asked for where the order of channels isn't free.
    """
    found: dict[str, Penalty] = {}
    for path, _ in dense_linears(block):
        chain = next((chain for chain in chains if path in chain.paths), None)
        choice = rules.attention if chain is None else rules.mlp
        if choice != "none":
            found[path] = _penalty(path, choice, chain, rules)
    return found


def _penalty(path: str, kind: Kind, chain: ChannelChain | None, rules: PenaltyRules) -> Penalty:
    if kind == "nuc":
        return Penalty("nuc")
    runs = chain.parts if chain is not None and path in chain.readers else 1
    if rules.anywhere:
        return Penalty(kind, rules.dims, rules.norm, runs)
    if chain is None:
        raise EmulatorError(
            f"smooth: the channels of {path} stand in a fixed order, so {kind} would tear its weights apart; use nuc "
            "there, or train"
        )
    free: Dim = "out" if path in chain.readers else "in"
    return Penalty(kind, (free,), rules.norm, runs) if free in rules.dims else Penalty("nuc")
