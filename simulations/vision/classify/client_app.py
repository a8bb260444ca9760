"""The data owners: a share of the labelled rows each. Everything else is offsite_fl's own client."""

from flwr.app import Context

from classify.settings import DataPart, owner_name
from offsite_fl.client_app import Data, load_from_node_config, make_client_app


def simulated(context: Context) -> bool:
    """Whether this owner is a part of the demo's data, and not a site that names its own."""
    return "partition-id" in context.node_config and "data" not in context.node_config


def load_data(context: Context) -> Data:
    """This owner's rows: by its own node config at a real site, by partition in a simulation."""
    if not simulated(context):
        return load_from_node_config(context)
    index, count = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return DataPart.of(context.run_config).shares(count, int(context.run_config["seed"]))[index]


def name(context: Context) -> str | None:
    """What reports call this owner in a simulation."""
    return owner_name(int(context.node_config["partition-id"])) if simulated(context) else None


app = make_client_app(load_data, name=name)
