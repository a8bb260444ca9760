"""Clients of a simulation that misbehave where a run says so: the part that all apps have in common.

The attacks themselves are no part of the package; an app says how its run's threat is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from offsite_fl.errors import OffsiteError
from offsite_fl.wire import names

Load = Callable[[Context], Any]


class Behaviour(Protocol):
    """What an attack does."""

    @property
    def flips_labels(self) -> bool:
        """Whether it is in the data that the attackers tune on, and not in their replies."""


class Threat(Protocol):
    """Who misbehaves in a run and how, as ``simulations.attacks.Threat`` has it."""

    @property
    def behaviour(self) -> Behaviour:
        """The attack."""

    def mod(self, message: Message, context: Context, call_next: ClientAppCallable, /) -> Message:
        """A Flower mod around tuning: spoiled replies of attackers, honest ones of the others."""


Find = Callable[[Context], Threat | None]


def misbehaving(find: Find) -> Mod:
    """A Flower mod around tuning that does what the threat says, or answers with the ``OffsiteError`` of ``find``."""

    def misbehave(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            threat = find(context)
        except OffsiteError as error:
            return Message(Error(names.REFUSED, f"{type(error).__name__}: {error}"), reply_to=message)
        return call_next(message, context) if threat is None else threat.mod(message, context, call_next)

    return misbehave


def or_poisoned(load_data: Load, find: Find, poison: Callable[[Threat, Context], Load]) -> Load:
    """``load_data``, or what ``poison`` makes in its place where the run's attack is in the data."""

    @functools.wraps(load_data)
    def load(context: Context) -> Any:
        threat = find(context)
        if threat is None or not threat.behaviour.flips_labels:
            return load_data(context)
        return poison(threat, context)(context)

    return load
