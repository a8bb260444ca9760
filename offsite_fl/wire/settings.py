"""Settings of one round as they travel in a message's config record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from offsite_fl.config import TuneConfig, from_mapping, to_mapping
from offsite_fl.errors import ConfigError, WireError
from offsite_fl.wire import names

# What decides which tensors travel is one choice for the whole federation.
SERVER_ONLY = ("lora-alpha", "lora-dropout", "lora-targets", "lora-train", "lora-fresh")
RANK = names.TUNE + "lora-rank"


def tune_to_config(tune: TuneConfig) -> dict[str, Any]:
    """``tune.*`` entries for a config record.

    Settings that are None are left out instead of sent as "", which Flower's byte counters can't count.
    """
    return {key: value for key, value in to_mapping(tune, names.TUNE).items() if value != ""}


def tune_from_config(config: Mapping[str, Any], node_config: Mapping[str, Any], client: str) -> TuneConfig:
    """What a client tunes with: the message's ``tune.*``, overridden by the site's own, with this client's own seed.

    A proximal term that FedProx put into the config wins over ``tune.proximal-mu``. ``ConfigError`` names a setting
    that is unknown, or that a site may not choose for itself. A smaller ``tune.lora-rank`` it may: the tensors that
    travel keep the run's rank, and ``lora_alpha`` shrinks with the rank, so that ``alpha / rank`` is the run's.
    """
    sent = {key: value for key, value in config.items() if key.startswith(names.TUNE)}
    own = {key: value for key, value in node_config.items() if key.startswith(names.TUNE)}
    for name in SERVER_ONLY:
        if names.TUNE + name in own:
            raise ConfigError(f"{names.TUNE}{name} can't be set for one site: it decides which tensors travel")
    rank = own.pop(RANK, None)
    tune = from_mapping(TuneConfig, sent | own, names.TUNE)
    if rank is not None:
        tune = _of_rank(tune, rank)
    mu = config.get(names.PROXIMAL_MU)
    if mu is not None:
        if isinstance(mu, bool) or not isinstance(mu, (int, float)):
            raise WireError(f"{names.PROXIMAL_MU} must be a number, got {ascii(mu)[:40]}")
        tune = dataclasses.replace(tune, proximal_mu=float(mu))
    # Where one schedule spans the rounds, so does one order of the data: each round goes on where the last one stopped.
    # Elsewhere each round begins a shuffle of its own.
    number = 0 if spans_rounds(tune) else server_round(config)
    return dataclasses.replace(tune, seed=client_seed(tune.seed, number, client))


def tune_of_run(config: Mapping[str, Any]) -> TuneConfig:
    """The message's own ``tune.*`` without what a site overrides: what decides which tensors travel."""
    return from_mapping(TuneConfig, {k: v for k, v in config.items() if k.startswith(names.TUNE)}, names.TUNE)


def _of_rank(tune: TuneConfig, value: Any) -> TuneConfig:
    rank = from_mapping(TuneConfig, {RANK: value}, names.TUNE).lora_rank
    if tune.lora_rank == 0:
        raise ConfigError(f"{RANK} can't be set for one site: this run tunes no LoRA factors, so others would travel")
    if not 1 <= rank <= tune.lora_rank:
        raise ConfigError(f"{RANK} = {rank} of this site must lie from 1 to {tune.lora_rank}, the rank of the run")
    return dataclasses.replace(tune, lora_rank=rank, lora_alpha=tune.lora_alpha * rank / tune.lora_rank)


def spans_rounds(tune: TuneConfig) -> bool:
    """Whether one learning-rate schedule spans all rounds: its length and the steps of a round are both set."""
    return tune.schedule_steps is not None and tune.max_steps is not None


def tune_of_round(tune: TuneConfig, server_round: int) -> TuneConfig:
    """``tune`` with the learning-rate schedule moved on by the rounds before, where it spans rounds."""
    if tune.schedule_steps is None or tune.max_steps is None:  # spans_rounds(), spelt out for the type checker
        return tune
    offset = tune.schedule_offset + (server_round - 1) * tune.max_steps
    return dataclasses.replace(tune, schedule_offset=min(offset, tune.schedule_steps))


def server_round(config: Mapping[str, Any]) -> int:
    """The round a message belongs to; Flower's strategies put it there."""
    value = config.get(names.SERVER_ROUND, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise WireError(f"{names.SERVER_ROUND} must be a whole number from 0, got {ascii(value)[:40]}")
    return value


def client_seed(run_seed: int, server_round: int, client: str) -> int:
    """Seed of one client in one round, from 0 to 2**31 - 1: the same for the same run seed, round and name.

    Hashed rather than added up, so that neighbouring rounds and clients don't share random streams.

    >>> client_seed(0, 1, "client-0"), client_seed(0, 1, "client-1")
    (2083909717, 1051968478)
    """
    digest = hashlib.sha256(f"{run_seed}/{server_round}/{client}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
