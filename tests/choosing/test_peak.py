"""The peak of a piece of work: what it held at once, whatever is left at the end."""

from __future__ import annotations

import sys

import pytest
import torch

from offsite_fl.choosing.peak import peak_memory

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_peak_and_not_the_end() -> None:
    for _ in range(2):  # what the first round has freed must not hide the second
        with peak_memory("cpu") as peak:
            large = torch.ones(64 * MIB // 4)
            del large
        if peak.bytes is None:
            pytest.skip("this system doesn't let the mark be set back")
        assert 60 * MIB <= peak.bytes <= 100 * MIB


def test_nothing_takes_next_to_nothing() -> None:
    with peak_memory("cpu") as peak:
        pass
    assert peak.bytes is None or peak.bytes < 8 * MIB


def test_unknown_devices_tell_nothing() -> None:
    with peak_memory("meta") as peak:
        pass
    assert peak.bytes is None
