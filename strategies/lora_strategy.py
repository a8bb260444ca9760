"""What the strategies for LoRA factors have in common, and what they ask of a run's settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from offsite_fl.config import Factors, TuneConfig
from offsite_fl.errors import ConfigError
from offsite_fl.tuning.lora import check_rank, unmoved
from offsite_fl.wire import names
from offsite_fl.wire.replies import FreshFactors

from .snapshot import nested_of

if TYPE_CHECKING:
    from offsite_fl.owner import ModelOwner

TRAIN = names.TUNE + "lora-train"


class LoraStrategy(FedAvg):
    """FedAvg that says in its train messages which factors of ``W + s B A`` are trained in a round.

    Works inside :class:`OffsiteTuning`, which asks for ``lora_rank`` above 0 and gives :meth:`aggregate_train` replies
    in the form of the run's state. ``fresh`` makes that state the full adapter: see ``lora_fresh`` of ``TuneConfig``.
    """

    fresh: ClassVar[bool] = False

    def trained(self, server_round: int) -> Factors:
        """The factors that are trained in this round; the others stay as they are, on every client."""
        return "both"

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages with ``tune.lora-train``."""
        config[TRAIN] = self.trained(server_round)
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages


def settled(tune: TuneConfig, base: Strategy) -> TuneConfig:
    """``tune`` as the LoRA strategy in ``base``, if there is one, needs it; ``ConfigError`` if the two don't go."""
    found = next(iter(nested_of(base, LoraStrategy)), None)
    if found is None:
        return tune
    name = type(found).__name__
    if tune.lora is None:
        raise ConfigError(f"{name} federates LoRA factors, but lora-rank is 0: set tune.lora-rank, for example to 8")
    if tune.lora_train != "both":
        raise ConfigError(f"{name} itself says which factors are trained: leave out lora-train = {tune.lora_train!r}")
    if tune.lora_fresh and not found.fresh:
        raise ConfigError(f"{name} works on factors, but lora-fresh federates the full adapter: leave it out")
    return replace(tune, lora_fresh=found.fresh)


def fresh_factors(owner: ModelOwner, tune: TuneConfig) -> FreshFactors | None:
    """How to read replies that are factors on top of the adapter; None where they are of the state's own form."""
    if tune.lora is None or not tune.lora_fresh:
        return None
    factors = owner.initial_state(tune.lora, tune.seed)
    check_rank({name: tuple(value.shape) for name, value in factors.items()})
    return FreshFactors(unmoved(factors), owner.lora_targets(tune.lora), tune.lora.alpha / tune.lora.rank)
