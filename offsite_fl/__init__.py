"""Offsite tuning and federated learning: adapt a model with data that its owner never sees.

The model owner hands out a *bundle* (adapter, compressed emulator, shared tensors); data owners tune the adapter on
their own data and hand back *updates*; the owner plugs the result into the full model.

Names below are imported when they are first used, so that ``import offsite_fl`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offsite_fl.version import __version__

if TYPE_CHECKING:
    from offsite_fl.bundle import Bundle, Cache
    from offsite_fl.choosing import Budget, Cell, Choice, OverSeeds, Standing, choose
    from offsite_fl.client_app import make_client_app
    from offsite_fl.config import LoraOptions, TuneConfig
    from offsite_fl.data_owner import DataOwner
    from offsite_fl.emulators import parse_emulator
    from offsite_fl.emulators.crash import Crash
    from offsite_fl.emulators.distill import Distill
    from offsite_fl.emulators.layer_drop import LayerDrop
    from offsite_fl.emulators.low_rank import LowRank
    from offsite_fl.emulators.placement import spread_split
    from offsite_fl.emulators.quantize import Quantize
    from offsite_fl.errors import OffsiteError
    from offsite_fl.measure import Measure
    from offsite_fl.models.split import Split
    from offsite_fl.owner import ModelOwner
    from offsite_fl.repair import Repair
    from offsite_fl.update import Update

_HOME = {
    "Budget": "choosing",
    "Bundle": "bundle",
    "Cache": "bundle",
    "Cell": "choosing",
    "Choice": "choosing",
    "Crash": "emulators.crash",
    "DataOwner": "data_owner",
    "Distill": "emulators.distill",
    "LayerDrop": "emulators.layer_drop",
    "LoraOptions": "config",
    "LowRank": "emulators.low_rank",
    "Measure": "measure",
    "ModelOwner": "owner",
    "OffsiteError": "errors",
    "OverSeeds": "choosing",
    "Quantize": "emulators.quantize",
    "Repair": "repair",
    "Split": "models.split",
    "Standing": "choosing",
    "TuneConfig": "config",
    "Update": "update",
    "choose": "choosing",
    "make_client_app": "client_app",
    "parse_emulator": "emulators",
    "spread_split": "emulators.placement",
}

__all__ = [
    "Budget",
    "Bundle",
    "Cache",
    "Cell",
    "Choice",
    "Crash",
    "DataOwner",
    "Distill",
    "LayerDrop",
    "LoraOptions",
    "LowRank",
    "Measure",
    "ModelOwner",
    "OffsiteError",
    "OverSeeds",
    "Quantize",
    "Repair",
    "Split",
    "Standing",
    "TuneConfig",
    "Update",
    "__version__",
    "choose",
    "make_client_app",
    "parse_emulator",
    "spread_split",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
