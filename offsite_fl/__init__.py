"""Federated offsite-tuning: the model owner keeps the model, the data owners keep the data."""

from offsite_fl.errors import OffsiteError
from offsite_fl.version import __version__

__all__ = ["OffsiteError", "__version__"]
