"""Which penalty lands on which linear: differences only where the order of channels is free, or anywhere."""

from __future__ import annotations

import pytest
from torch import nn

from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.penalties import Dim, Penalty
from offsite_fl.emulators.penalty_choice import PenaltyRules, choose_penalties
from offsite_fl.errors import EmulatorError

NUC = Penalty("nuc")


def block() -> tuple[nn.Module, tuple[ChannelChain, ...]]:
    linears = {"q": nn.Linear(4, 4), "gate_up": nn.Linear(4, 12), "down": nn.Linear(6, 4), "norm": nn.LayerNorm(4)}
    return nn.ModuleDict(linears), (ChannelChain(("gate_up",), "down", 6, parts=2),)


@pytest.mark.parametrize(
    ("dims", "gate_up", "down"),
    [
        (("out",), Penalty("d2", ("out",), runs=2), NUC),
        (("in",), NUC, Penalty("d2", ("in",))),
        (("out", "in"), Penalty("d2", ("out",), runs=2), Penalty("d2", ("in",))),
    ],
)
def test_differences_where_the_order_is_free(dims: tuple[Dim, ...], gate_up: Penalty, down: Penalty) -> None:
    found = choose_penalties(*block(), PenaltyRules("nuc", "d2", dims))
    assert found == {"q": NUC, "gate_up": gate_up, "down": down}


@pytest.mark.parametrize("kind", ["d1", "d2"])
def test_a_fixed_order_is_refused(kind: str) -> None:
    with pytest.raises(EmulatorError, match=f"the channels of q stand in a fixed order, so {kind} would"):
        choose_penalties(*block(), PenaltyRules(kind, "nuc"))  # type: ignore[arg-type]


def test_anywhere() -> None:
    found = choose_penalties(*block(), PenaltyRules("d1", "d2", ("out", "in"), "l1", anywhere=True))
    both: tuple[Dim, ...] = ("out", "in")
    expected = {
        "q": Penalty("d1", both, "l1"),
        "gate_up": Penalty("d2", both, "l1", 2),
        "down": Penalty("d2", both, "l1"),
    }
    assert found == expected


def test_none() -> None:
    assert choose_penalties(*block(), PenaltyRules("none", "nuc")) == {"gate_up": NUC, "down": NUC}
    assert choose_penalties(*block(), PenaltyRules("nuc", "none")) == {"q": NUC}
