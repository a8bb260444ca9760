"""The examples in docstrings are run. Modules are imported by their own names, so no registry is filled twice."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import offsite_fl
import offsite_fl.strategies

MODULES = [
    "offsite_fl",
    *sorted(m.name for m in pkgutil.walk_packages(offsite_fl.__path__, "offsite_fl.") if "__main__" not in m.name),
    *sorted(m.name for m in pkgutil.iter_modules(offsite_fl.strategies.__path__, "offsite_fl.strategies.")),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    names = ("offsite_fl.registry", "offsite_fl.config")
    assert all(doctest.testmod(importlib.import_module(name)).attempted for name in names)
