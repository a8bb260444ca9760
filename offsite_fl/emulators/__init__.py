"""Ways of compressing the frozen middle of a model into an emulator. One file a method; methods chain."""

from offsite_fl.emulators.base import (
    METHODS,
    Batch,
    Chain,
    Context,
    Emulator,
    EmulatorBlock,
    EmulatorMethod,
    register,
    start,
)
from offsite_fl.emulators.spec import MethodHelp, OptionHelp, describe_emulators, parse_emulator

__all__ = [
    "METHODS",
    "Batch",
    "Chain",
    "Context",
    "Emulator",
    "EmulatorBlock",
    "EmulatorMethod",
    "MethodHelp",
    "OptionHelp",
    "describe_emulators",
    "parse_emulator",
    "register",
    "start",
]
