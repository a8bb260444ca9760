"""The data owners of a grid: one site like any other, whose data are those of the cell that a message belongs to."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable

from offsite_fl.choosing.peak import peak_memory
from offsite_fl.client_app import Data, LoadData, make_client_app
from offsite_fl.comparing.division import client_name
from offsite_fl.comparing.results import PEAK
from offsite_fl.config import TuneConfig
from offsite_fl.errors import ConfigError
from offsite_fl.local.misbehaving import misbehaving, or_poisoned
from offsite_fl.models.load import load_model
from offsite_fl.tuning.dtypes import resolve_device
from offsite_fl.wire import names

CELL = "compare."
DATA, CACHE, MODEL = CELL + "data", CELL + "cache", CELL + "model"
STATE = CELL + "state"  # in every message: patches too are of one cell
ATTACK, ATTACKERS, PACKAGE = CELL + "attack", CELL + "attackers", CELL + "attack-package"


def with_cell(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod that puts what a message says about its cell into the run config, where ``load_data`` looks.

    The context is copied: the next message may belong to another cell. What clients remember is of their cell too. So
    each cell may ask its own question about public text, of which a site that isn't simulated answers one for good.
    """
    records = message.content.config_records.values() if message.has_content() else ()
    told = {key: value for record in records for key, value in record.items() if key.startswith(CELL)}
    run_config: dict[str, Any] = {**context.run_config, **told}
    node_config = dict(context.node_config)
    if run_config.get(CACHE):
        node_config.setdefault("cache-dir", str(run_config[CACHE]))
    if run_config.get(STATE):
        node_config.setdefault("state-dir", str(run_config[STATE]))
    return call_next(message, Context(context.run_id, context.node_id, node_config, context.state, run_config))


def with_peak(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod around tuning that adds how much memory it took beyond what this process held before."""
    settings = message.content.config_records.get(names.CONFIG, ConfigRecord())
    device = settings.get(names.TUNE + "device") or None
    with peak_memory(str(resolve_device(TuneConfig(device=device if isinstance(device, str) else None)))) as peak:
        reply = call_next(message, context)
    if reply.has_content() and peak.bytes is not None:
        reply.content.metric_records[names.METRICS][PEAK] = peak.bytes
    return reply


def threat_of(context: Context) -> Any:
    """Who misbehaves in the cell and how, from the package that the grid names; None in an honest cell."""
    config = context.run_config
    if not config.get(ATTACK):
        return None
    return make_threat(str(config[PACKAGE]), str(config[ATTACK]), str(config[ATTACKERS]))


def make_threat(package: str, attack: str, attackers: str) -> Any:
    """The ``Threat`` of a package; ``ConfigError`` if there is none, or if it knows no such attack."""
    try:
        kind = importlib.import_module(package).Threat
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"attacks are for simulations from the repository: {package}.Threat can't be had here ({error}); run "
            "offsite-fl compare in its root, or set grid.attack-package"
        ) from error
    return kind.of({"attack": attack, "attackers": attackers})


misbehave = misbehaving(threat_of)  # a Flower mod around tuning that does what the cell's attack says, or nothing


def _poisoned(threat: Any, context: Context) -> LoadData:
    config = context.run_config
    flipped = importlib.import_module(str(config[PACKAGE])).with_flipped_labels
    size, loss_on = int(config[CELL + "block-size"]), config[CELL + "loss-on"]
    poisoned: LoadData = flipped(_file, threat.attackers, _tokenizer_of, size, loss_on)
    return poisoned


def _file(context: Context) -> Data:
    folder = context.run_config.get(DATA)
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"the message doesn't say {DATA}: this app belongs to offsite-fl compare")
    return str(Path(folder) / f"{client_name(int(context.node_config['partition-id']))}.jsonl")


def _tokenizer_of(context: Context) -> Any:
    return _tokenizer(str(context.run_config[MODEL]))


@functools.cache
def _tokenizer(model: str) -> Any:
    return load_model(model)[1]


# This client's file in the cell's folder, with flipped labels for attackers whose attack is that.
load_data: LoadData = or_poisoned(_file, threat_of, _poisoned)

app = make_client_app(load_data, mods=[with_cell], train_mods=[misbehave, with_peak])
