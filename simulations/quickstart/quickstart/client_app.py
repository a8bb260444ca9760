"""The data owners: one text file each. Everything else is offsite_fl's own client."""

from flwr.app import Context

from offsite_fl.client_app import Data, load_from_node_config, make_client_app
from offsite_fl.errors import ConfigError
from quickstart.attack import misbehave, or_flipped
from quickstart.settings import DataPart


def load_data(context: Context) -> Data:
    """This owner's file: by its own node config at a real site, by partition in a simulation."""
    if "data" in context.node_config or "partition-id" not in context.node_config:
        return load_from_node_config(context)
    part = DataPart.of(context.run_config)
    index, count = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    if count > len(part.owners):
        raise ConfigError(f"{count} nodes share {len(part.owners)} owners' files: set num-supernodes to at most that")
    return str(part.file(part.owners[index]))


def name(context: Context) -> str | None:
    """What reports call this owner in a simulation: its file's name."""
    if "partition-id" not in context.node_config or "data" in context.node_config:
        return None
    return DataPart.of(context.run_config).owners[int(context.node_config["partition-id"])]


app = make_client_app(or_flipped(load_data), name=name, train_mods=[misbehave])
