"""Offsite tuning and federated learning: adapt a model with data that its owner never sees.

The model owner hands out a *bundle* (adapter, compressed emulator, shared tensors); data owners tune the adapter on
their own data and hand back *updates*; the owner plugs the result into the full model.
"""

from offsite_fl.version import __version__

__all__ = ["__version__"]
