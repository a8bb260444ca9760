"""In a simulation some owners can misbehave: the run config's ``attack`` says how, ``attackers`` who.

The attacks are in the repository's ``simulations.attacks``, which is loaded only where one is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable
from transformers import PreTrainedTokenizerBase

from offsite_fl.client_app import Data, LoadData
from offsite_fl.errors import ConfigError, OffsiteError
from offsite_fl.models.load import load_model
from offsite_fl.wire import names
from quickstart.settings import model_path

if TYPE_CHECKING:
    from simulations.attacks import Threat


def threat_of(run_config: Mapping[str, Any]) -> Threat | None:
    """Who misbehaves in this run and how; None in an honest one."""
    if not run_config.get("attack"):
        return None
    try:
        from simulations.attacks import Threat
    except ModuleNotFoundError as error:
        raise ConfigError(
            "attack is for simulations from the repository: run it in its root with PYTHONPATH=., or leave it out"
        ) from error
    if run_config.get("codec", "fp32") != "fp32":
        raise ConfigError(f"attack works on plain values: set codec to fp32, not {run_config['codec']!r}")
    return Threat.of(run_config)


def misbehave(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod around tuning that does what the run config says, or nothing."""
    try:
        threat = threat_of(context.run_config)
    except OffsiteError as error:
        return Message(Error(names.REFUSED, f"{type(error).__name__}: {error}"), reply_to=message)
    return call_next(message, context) if threat is None else threat.mod(message, context, call_next)


def or_flipped(load_data: LoadData) -> LoadData:
    """``load_data``, with flipped labels for attackers where the run config asks for that."""

    @functools.wraps(load_data)
    def load(context: Context) -> Data:
        threat = threat_of(context.run_config)
        if threat is None or not threat.behaviour.flips_labels:
            return load_data(context)
        from simulations.attacks import with_flipped_labels

        tune = {key: context.run_config[f"tune.{key}"] for key in ("block-size", "loss-on")}
        poisoned = with_flipped_labels(
            load_data,
            threat.attackers,
            tokenizer_of,
            int(tune["block-size"]),
            tune["loss-on"],  # type: ignore[arg-type]
        )
        return poisoned(context)

    return load


def tokenizer_of(context: Context) -> PreTrainedTokenizerBase:
    """The tokenizer of the run's model, which lies on this machine as everything does in a simulation."""
    return _tokenizer(str(context.run_config["model"]))


@functools.cache
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    return load_model(model_path(model))[1]  # the model is let go at once
