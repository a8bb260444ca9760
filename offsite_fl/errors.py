"""Every error that a user can cause. All derive from :class:`OffsiteError`, so one ``except`` catches them.

A message says what was wrong, where, and what would be right; the command line prints it without a traceback.
"""


class OffsiteError(Exception):
    """Base of all errors that offsite_fl raises on purpose."""


class ConfigError(OffsiteError):
    """A setting is unknown, has the wrong type or lies out of range."""


class ModelError(OffsiteError):
    """A model can't be opened, or its repeated blocks can't be found."""


class SplitError(OffsiteError):
    """A split doesn't fit the depth of the model."""


class EmulatorError(OffsiteError):
    """An emulator can't be built as asked for."""


class BundleError(OffsiteError):
    """A bundle is damaged, forged, too new, too large, or not for this model."""


class UpdateError(OffsiteError):
    """An update doesn't fit the model: names, shapes, values, or the bundle that it was made for."""


class DataError(OffsiteError):
    """A data file is missing, empty, unreadable or lacks a column."""


class WireError(OffsiteError):
    """A Flower message doesn't hold what the protocol says."""


class StateError(OffsiteError):
    """What a site keeps between rounds is lost, damaged, or of another round than the server counts on."""


class CheckpointError(OffsiteError):
    """A run folder can't be resumed from."""
