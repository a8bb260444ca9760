"""Which penalty lands on which linear: differences only where the order of channels is free, or anywhere."""

from __future__ import annotations

import pytest
from torch import nn

from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.free_order import Free
from offsite_fl.emulators.penalties import Dim, Penalty
from offsite_fl.emulators.penalty_choice import PenaltyRules, choose_penalties
from offsite_fl.emulators.value_dims import ValueDims

NUC = (Penalty("nuc"),)
VALUES = ValueDims("v", "o", heads=2, size=2, copies=2)


def block() -> tuple[nn.Module, tuple[Free, ...]]:
    linears = {
        "q": nn.Linear(4, 8),
        "v": nn.Linear(4, 4),
        "o": nn.Linear(8, 4),
        "gate_up": nn.Linear(4, 12),
        "down": nn.Linear(6, 4),
        "norm": nn.LayerNorm(4),
    }
    return nn.ModuleDict(linears), (ChannelChain(("gate_up",), "down", 6, parts=2), VALUES)


@pytest.mark.parametrize(
    ("dims", "gate_up", "down"),
    [
        (("out",), (Penalty("d2", ("out",), runs=2),), NUC),
        (("in",), NUC, (Penalty("d2", ("in",)),)),
        (("out", "in"), (Penalty("d2", ("out",), runs=2),), (Penalty("d2", ("in",)),)),
    ],
)
def test_differences_along_an_mlps_channels(
    dims: tuple[Dim, ...], gate_up: tuple[Penalty, ...], down: tuple[Penalty, ...]
) -> None:
    found = choose_penalties(*block(), PenaltyRules("nuc", "d2", dims))
    assert found == {"q": NUC, "v": NUC, "o": NUC, "gate_up": gate_up, "down": down}


@pytest.mark.parametrize(
    ("dims", "v", "o"),
    [
        (("out",), (Penalty("d1", ("out",), runs=2),), NUC),
        (("in",), NUC, (Penalty("d1", ("in",), runs_in=4),)),
        (("out", "in"), (Penalty("d1", ("out",), runs=2),), (Penalty("d1", ("in",), runs_in=4),)),
    ],
)
def test_differences_along_values(dims: tuple[Dim, ...], v: tuple[Penalty, ...], o: tuple[Penalty, ...]) -> None:
    """Two heads of values, four that are read. Queries have no free order, so they get the nuclear norm."""
    found = choose_penalties(*block(), PenaltyRules("d1", "nuc", dims))
    assert found == {"q": NUC, "v": v, "o": o, "gate_up": NUC, "down": NUC}


def test_where_nothing_is_free_there_is_the_nuclear_norm() -> None:
    found = choose_penalties(block()[0], (), PenaltyRules("d1", "d2"))
    assert found == dict.fromkeys(("q", "v", "o", "gate_up", "down"), NUC)


def test_sums() -> None:
    found = choose_penalties(*block(), PenaltyRules("nuc", "d1/d2"))
    assert found["gate_up"] == (Penalty("d1", runs=2), Penalty("d2", runs=2)) and found["down"] == found["q"] == NUC
    found = choose_penalties(*block(), PenaltyRules("nuc/d1", "nuc/d1/d2", anywhere=True))
    assert found["q"] == (*NUC, Penalty("d1")) and found["v"] == (*NUC, Penalty("d1", runs=2))
    assert found["down"] == (*NUC, Penalty("d1"), Penalty("d2"))


def test_anywhere() -> None:
    found = choose_penalties(*block(), PenaltyRules("d1", "d2", ("out", "in"), "l1", anywhere=True))
    both: tuple[Dim, ...] = ("out", "in")
    expected = {
        "q": Penalty("d1", both, "l1"),
        "v": Penalty("d1", both, "l1", runs=2),
        "o": Penalty("d1", both, "l1", runs_in=4),
        "gate_up": Penalty("d2", both, "l1", runs=2),
        "down": Penalty("d2", both, "l1"),
    }
    assert found == {path: (penalty,) for path, penalty in expected.items()}


def test_none() -> None:
    assert choose_penalties(*block(), PenaltyRules("none", "nuc")) == {"gate_up": NUC, "down": NUC}
    assert choose_penalties(*block(), PenaltyRules("nuc", "none")) == {"q": NUC, "v": NUC, "o": NUC}
