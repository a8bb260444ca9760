"""The data owners: one text file each. Everything else is offsite_fl's own client."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from offsite_fl.client_app import Data, load_from_node_config, make_client_app
from offsite_fl.errors import ConfigError
from quickstart.attack import misbehave, or_flipped
from quickstart.settings import DataPart


def simulated(context: Context) -> bool:
    """Whether this owner is a part of the demo's data, and not a site that names its own."""
    return "partition-id" in context.node_config and "data" not in context.node_config


def in_the_runs_folder(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A Flower mod: simulated owners remember in the run's folder, and not in the cache that all runs share.

    So the next run may ask them about another public text; a site that isn't simulated answers for one, for good.
    """
    if not simulated(context) or "state-dir" in context.node_config:
        return call_next(message, context)
    kept = Path(str(context.run_config["run.folder"])).absolute() / "sites"
    own = {**context.node_config, "state-dir": str(kept)}
    return call_next(message, Context(context.run_id, context.node_id, own, context.state, context.run_config))


def load_data(context: Context) -> Data:
    """This owner's file: by its own node config at a real site, by partition in a simulation."""
    if not simulated(context):
        return load_from_node_config(context)
    part = DataPart.of(context.run_config)
    index, count = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    if count > len(part.owners):
        raise ConfigError(f"{count} nodes share {len(part.owners)} owners' files: set num-supernodes to at most that")
    return str(part.file(part.owners[index]))


def name(context: Context) -> str | None:
    """What reports call this owner in a simulation: its file's name."""
    if not simulated(context):
        return None
    return DataPart.of(context.run_config).owners[int(context.node_config["partition-id"])]


app = make_client_app(or_flipped(load_data), name=name, train_mods=[misbehave], mods=[in_the_runs_folder])
