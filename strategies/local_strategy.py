"""Strategies whose clients do something other than plain tuning: what they ask for, and what travels then."""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from offsite_fl.errors import ConfigError
from offsite_fl.local.algorithm import LocalAlgorithm
from offsite_fl.wire import names

from .outgoing import Form
from .snapshot import nested_of


class LocalStrategy(FedAvg):
    """FedAvg that names an algorithm of :mod:`offsite_fl.local` in its messages. Works inside :class:`OffsiteTuning`.

    ``run_key`` is drawn in the first round and goes into checkpoints: sites keep their state under it, so a resumed run
    finds it. ``options`` are FedAvg's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.run_key: str | None = None  # drawn later: no setting that must be the same on resume

    @abstractmethod
    def part(self, reference: Iterable[str]) -> LocalAlgorithm:
        """What the clients run, given the names of the run's tensors; ``ConfigError`` if it doesn't fit them."""

    def carried(self, part: LocalAlgorithm, arrays: ArrayRecord, *, train: bool) -> ArrayRecord:
        """What train or evaluate messages carry of the run's ``arrays``, and beside them."""
        return arrays

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages, with the algorithm in the config."""
        part = self.part(arrays)
        self._ask(part, config)
        carried = self.carried(part, arrays, train=True)
        messages: Iterable[Message] = super().configure_train(server_round, carried, config, grid)
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages, with the algorithm in the config where it has a say in evaluation."""
        part = self.part(arrays)
        if part.evaluates:
            self._ask(part, config)
        carried = self.carried(part, arrays, train=False)
        messages: Iterable[Message] = super().configure_evaluate(server_round, carried, config, grid)
        return messages

    def _ask(self, part: LocalAlgorithm, config: ConfigRecord) -> None:
        if self.run_key is None:
            self.run_key = secrets.token_hex(16)
        for key, value in {**part.to_config(), names.RUN_KEY: self.run_key}.items():
            config[key] = value


def forms(base: Strategy, form: Form) -> tuple[Form, Form]:
    """``form`` as train and as evaluate messages have it under ``base``; ``ConfigError`` if settings don't go with it.

    Both are ``form`` itself unless ``base`` is, or wraps, a :class:`LocalStrategy`.
    """
    found = next(iter(nested_of(base, LocalStrategy)), None)
    if found is None:
        return form, form
    part = found.part(form.reference)
    part.check(form.tune)
    if part.rewrites and found is not base:
        raise ConfigError(
            f"{type(base).__name__} can't go around {part.name}: it takes what travels for the adapter, "
            "which is less or more here"
        )
    carried = replace(form, reference=part.travels(form.reference), part=part)
    return replace(carried, beside=part.beside(form.reference)), carried if part.evaluates else form
