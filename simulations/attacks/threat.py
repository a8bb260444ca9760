"""Which clients of a simulation are malicious, and what they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from offsite_fl.config import check, from_mapping
from offsite_fl.errors import OffsiteError, WireError
from offsite_fl.wire import names
from offsite_fl.wire.codecs import decode, encode
from offsite_fl.wire.records import only_arrays, only_config
from offsite_fl.wire.settings import client_seed, server_round
from simulations.attacks.attacks import Attack
from simulations.attacks.spec import parse_attack


@dataclass(frozen=True)
class Threat:
    """An attack spec and the partition ids of those who carry it out. Real sites have no partition id."""

    attack: str
    attackers: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        _ = self.behaviour  # an unknown name fails here, with the near ones
        check(all(number >= 0 for number in self.attackers), f"attackers are partition ids from 0: {self.attackers}")

    @classmethod
    def of(cls, run_config: Mapping[str, Any]) -> Threat | None:
        """From the keys ``attack`` and ``attackers`` ("0,3") of a run config; None where the first is empty."""
        values = {key: run_config[key] for key in ("attack", "attackers") if key in run_config}
        return from_mapping(cls, values) if values.get("attack") else None

    @property
    def behaviour(self) -> Attack:
        """The attack, built."""
        return parse_attack(self.attack)

    def has(self, context: Context) -> bool:
        """Whether this client is one of the attackers."""
        return context.node_config.get("partition-id") in self.attackers

    def mod(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """A Flower mod around tuning: honest replies of honest clients, spoiled ones of attackers.

        An attacker trains as the others do, and changes the arrays afterwards, in fp32. Under another codec, and where
        a reply has other tensors than its message (fresh LoRA factors), it answers with an error.
        """
        if not self.has(context) or not self.behaviour.spoils_reply:
            return call_next(message, context)
        reply = call_next(message, context)
        if not reply.has_content():
            return reply
        try:
            return self._spoil(message, reply, int(context.node_config["partition-id"]))
        except OffsiteError as error:
            reason = f"{type(error).__name__}: attack {self.attack!r} can't be carried out: {error}"
            return Message(Error(names.REFUSED, reason), reply_to=message)

    def _spoil(self, message: Message, reply: Message, partition: int) -> Message:
        config, (key, arrays) = only_config(message.content)[1], only_arrays(reply.content)
        codec = config.get(names.CODEC, "fp32")
        if codec != "fp32":
            raise WireError(f"it works on plain values, the run has codec {codec!r}: take fp32")
        received_arrays = only_arrays(message.content)[1]
        if unknown := sorted(arrays.keys() - received_arrays.keys()):
            raise WireError(f"the reply has tensors that weren't in the message, for example {unknown[0]!r}")
        like = {name: torch.empty(tuple(received_arrays[name].shape)) for name in received_arrays}
        received = decode(received_arrays, config, like, "fp32")
        trained = decode(arrays, only_config(reply.content)[1], {name: received[name] for name in arrays}, "fp32")
        seed = client_seed(int(config.get(names.TUNE + "seed", 0)), server_round(config), f"attacker-{partition}")  # type: ignore[arg-type]
        spoiled = self.behaviour.reply(received, trained, torch.Generator().manual_seed(seed))
        reply.content[key] = encode(spoiled, spoiled)[0]
        return reply
