"""SCAFFOLD's control variate at a site: by hand, and where there is none to read off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offsite_fl.errors import OffsiteError
from offsite_fl.local import Scaffold
from offsite_fl.update import Update


class Step:
    """A :class:`offsite_fl.local.Job` of one tensor that moves by -1 on learning rates that sum to ``rates``."""

    kept: Any = None

    def __init__(self, rates: float, read: float = 0.0) -> None:
        self.rates, self.read = rates, read
        self.received = {"w": torch.tensor([3.0]), "control.w": torch.tensor([0.25])}

    def tuned(self, start: Any, **options: Any) -> Update:
        assert float(options["correction"]["w"]) == 0.25 - (float(self.kept["w"]) if self.kept else 0.0)
        return Update({"w": start["w"] - 1}, "d" * 64, 1, None, {"lr-sum": self.rates})

    def as_read(self, values: Any) -> Any:
        return {"w": values["w"] + self.read}


def test_by_hand() -> None:
    # c_i+ = c_i - c + (x - y) / lr_sum = 0.5 - 0.25 + 1 / 0.5
    job = Step(0.5)
    job.kept = {"w": torch.tensor([0.5])}
    found = Scaffold().tune(job)  # type: ignore[arg-type]
    assert float(found.keep["w"]) == 2.25 and found.tensors.keys() == {"w"}
    derived = Scaffold().derived(job.received, found.tensors, {"lr_sum": 0.5})
    assert {name: float(value) for name, value in derived.items()} == {"control.w": 1.75}  # what it changed by


def test_it_is_read_off_the_values_that_the_server_reads() -> None:
    found = Scaffold().tune(Step(0.5, read=0.25))  # type: ignore[arg-type]
    assert float(found.keep["w"]) == -0.25 + 0.75 / 0.5 and float(found.tensors["w"]) == 2.0


@pytest.mark.parametrize("rates", [0.0, float("nan")])
def test_no_step_that_counts_is_an_error(rates: float) -> None:
    with pytest.raises(OffsiteError, match="scaffold can't read a mean gradient"):
        Scaffold().tune(Step(rates))  # type: ignore[arg-type]
