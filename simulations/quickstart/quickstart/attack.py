"""In a simulation some owners can misbehave: the run config's ``attack`` says how, ``attackers`` who.

The attacks are in the repository's ``simulations.attacks``, which is loaded only where one is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from transformers import PreTrainedTokenizerBase

from offsite_fl.client_app import LoadData
from offsite_fl.errors import ConfigError
from offsite_fl.local.misbehaving import misbehaving, or_poisoned
from offsite_fl.models.load import load_model
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


def _found(context: Context) -> Threat | None:
    return threat_of(context.run_config)


misbehave = misbehaving(_found)  # a Flower mod around tuning that does what the run config says, or nothing


def or_flipped(load_data: LoadData) -> LoadData:
    """``load_data``, with flipped labels for attackers where the run config asks for that."""

    def poison(threat: Any, context: Context) -> LoadData:
        from simulations.attacks import with_flipped_labels

        size, loss_on = (context.run_config[f"tune.{key}"] for key in ("block-size", "loss-on"))
        return with_flipped_labels(load_data, threat.attackers, tokenizer_of, int(size), loss_on)  # type: ignore[arg-type]

    return or_poisoned(load_data, _found, poison)


def tokenizer_of(context: Context) -> PreTrainedTokenizerBase:
    """The tokenizer of the run's model, which lies on this machine as everything does in a simulation."""
    return _tokenizer(str(context.run_config["model"]))


@functools.cache
def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    return load_model(model_path(model))[1]  # the model is let go at once
