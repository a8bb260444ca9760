"""What a local algorithm is: a class that both sides know by name, whose options travel in the config record.

The client calls :meth:`LocalAlgorithm.tune`; the server asks the same class which tensors travel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from offsite_fl.config import TuneConfig, from_mapping, to_mapping
from offsite_fl.errors import ConfigError
from offsite_fl.registry import Registry
from offsite_fl.update import Update
from offsite_fl.wire import names
from offsite_fl.wire.records import text

Tensors = Mapping[str, torch.Tensor]
A = TypeVar("A", bound="LocalAlgorithm")


class Job(Protocol):
    """A site's part in one message: its settings, what came, what it kept, and the means to work with them.

    ``received`` are the decoded tensors of the message, fp32, under the names of :meth:`LocalAlgorithm.travels`.
    ``kept`` is what the same site kept in the last round of this run in which its reply was used; None where there was
    none. ``settings`` are the site's, ``run`` what the server asked of all.
    """

    @property
    def settings(self) -> TuneConfig:
        """The site's settings."""

    @property
    def run(self) -> TuneConfig:
        """The run's settings."""

    @property
    def received(self) -> Tensors:
        """What came."""

    @property
    def kept(self) -> Tensors | None:
        """What the site kept."""

    def tuned(
        self,
        start: Tensors,
        *,
        proximal_mu: float | None = None,
        towards: Tensors | None = None,
        correction: Tensors | None = None,
    ) -> Update:
        """Tune all adapter values (or LoRA factors) from ``start`` on this site's data.

        ``proximal_mu`` in place of the settings', pulling ``towards`` these values instead of ``start``; ``correction``
        is added to the gradient of every step.
        """

    def as_read(self, values: Tensors) -> dict[str, torch.Tensor]:
        """``values`` of a reply as the server will read them: rounded by the codec of the message."""

    def loss(self, values: Tensors) -> float | None:
        """Loss of all adapter values (or LoRA factors) on this site's validation data; None if it has none."""

    def initial(self) -> dict[str, torch.Tensor]:
        """All adapter values as the bundle has them, or the factors that a run begins with."""


@dataclass(frozen=True)
class Outcome:
    """``tensors`` travel back, all that :meth:`LocalAlgorithm.travels` names; ``keep`` stays until the next round."""

    tensors: Tensors
    num_examples: int
    metrics: Mapping[str, float]
    keep: Tensors = field(default_factory=dict)


class LocalAlgorithm(ABC):
    """A frozen dataclass whose fields are its options.

    ``evaluates``: evaluation isn't just the loss of the received values, so evaluate messages name the algorithm too.
    ``rewrites``: other tensors travel than the run's state, which privacy wrappers and mods can't deal with.
    """

    name: ClassVar[str]
    evaluates: ClassVar[bool] = True
    rewrites: ClassVar[bool] = False

    def travels(self, reference: Tensors) -> dict[str, torch.Tensor]:
        """Which of the run's tensors travel: a part of ``reference``, the values by name that codecs measure from."""
        return dict(reference)

    def beside(self, reference: Tensors) -> dict[str, torch.Tensor]:
        """What travels down beside them in train messages, by name with the values that codecs measure from."""
        return {}

    def derived(self, sent: Tensors, values: Tensors, metrics: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """What the server works out from a reply for itself, by name: nothing beside ``values`` travels up.

        ``sent`` is what the site was sent, ``values`` what it sent back, both fp32 as they are read at the other end,
        and ``metrics`` are those of the reply.
        """
        return {}

    def keeps(self, names_of_run: Iterable[str]) -> list[str]:
        """Names of what a site keeps between rounds, given those of the run's tensors."""
        return list(names_of_run)

    def check(self, tune: TuneConfig) -> None:
        """``ConfigError`` if this algorithm can't work with these settings, of a run or of one site."""
        for what, wrong in (("lora-fresh", tune.lora_fresh), ("lora-train", tune.lora_train != "both")):
            if wrong:
                raise ConfigError(f"{self.name} needs the same tensors at all sites in all rounds: leave out {what}")

    @abstractmethod
    def tune(self, job: Job) -> Outcome:
        """What a site does with a train message."""

    def evaluate(self, job: Job) -> dict[str, float]:
        """Metrics of an evaluate message by name; ``job`` has validation data."""
        return as_metrics(job, job.received)

    def to_config(self) -> dict[str, Any]:
        """The entries of a config record that :func:`read_algorithm` reads."""
        return {names.ALGORITHM: self.name, **to_mapping(self, names.OPTION)}


ALGORITHMS: Registry[type[LocalAlgorithm]] = Registry("local algorithm")


def register(name: str) -> Callable[[type[A]], type[A]]:
    """Class decorator that files an algorithm under ``name``."""

    def add(cls: type[A]) -> type[A]:
        cls.name = name
        ALGORITHMS.register(name)(cls)
        return cls

    return add


def read_algorithm(config: Mapping[str, Any]) -> LocalAlgorithm | None:
    """The algorithm that a message asks for; None is plain tuning. ``ConfigError`` names one that isn't known here."""
    if names.ALGORITHM not in config:
        return None
    kind = ALGORITHMS[text(config[names.ALGORITHM], names.ALGORITHM)]
    return from_mapping(kind, config, names.OPTION)


def as_metrics(job: Job, values: Tensors) -> dict[str, float]:
    """The usual metric of an evaluate message."""
    loss = job.loss(values)
    return {} if loss is None else {names.LOSS: loss}
