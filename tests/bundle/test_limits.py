"""Limits that make sense."""

from __future__ import annotations

import pytest

from offsite_fl.bundle.limits import Limits
from offsite_fl.errors import ConfigError


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_dims"):
        Limits(max_dims=0)
