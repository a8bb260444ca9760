"""Who gets which rows: the partitioners of flwr-datasets by name, ``dirichlet:alpha=0.3``.

Every row goes to one client. Rows are shuffled first, for Flower's IID and size partitioners cut where the rows lie.
"""

from __future__ import annotations

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from flwr_datasets import partitioner as flower

from offsite_fl.config import check, check_choices, from_mapping, kebab, read_spec
from offsite_fl.errors import ConfigError
from offsite_fl.registry import Registry

OWNER = "owner"
ROW = "row"


class Partition(ABC):
    """One way of dividing rows. Subclasses are frozen dataclasses whose fields are the spec's options."""

    def check_clients(self, clients: int, owners: int) -> None:
        """``ConfigError`` if ``owners`` domains can't be divided among so many clients; by default they can."""
        check(clients >= 1, f"there must be at least one client, got {clients}")

    @abstractmethod
    def partitioner(self, clients: int, seed: int) -> Any:
        """Flower's partitioner for so many clients."""

    def divide(self, rows: Dataset, clients: int, seed: int) -> list[list[int]]:
        """Row numbers by client: disjoint, and all of them together. ``rows`` has the column ``owner``."""
        self.check_clients(clients, len(set(rows[OWNER])))
        order = np.random.default_rng(seed).permutation(len(rows))
        shuffled = Dataset.from_dict({ROW: order.tolist(), OWNER: [rows[OWNER][i] for i in order]})
        part = self.partitioner(clients, seed)
        part.dataset = shuffled
        try:
            shares = [list(part.load_partition(number)[ROW]) for number in range(clients)]
        except ValueError as error:  # Flower's word for what can't be divided so
            raise ConfigError(f"{len(rows)} rows can't be divided by {self!r} among {clients}: {error}") from error
        check_shares(shares, len(rows))
        return shares


def check_shares(shares: list[list[int]], rows: int) -> None:
    """``ConfigError`` unless every one of ``rows`` is with exactly one client, and every client has some."""
    given = sorted(row for share in shares for row in share)
    if doubled := [one for one, other in itertools.pairwise(given) if one == other]:
        raise ConfigError(f"row {doubled[0]} is with two clients")
    if empty := [number for number, share in enumerate(shares) if not share]:
        raise ConfigError(f"client {empty[0]} has no rows: take fewer clients")
    if len(given) != rows:
        raise ConfigError(f"{rows - len(given)} of {rows} rows are with nobody: take more classes or more clients")


PARTITIONS: Registry[type[Partition]] = Registry("partition")


def register(name: str) -> Callable[[type[Partition]], type[Partition]]:
    """Decorator that files a frozen dataclass under the name used in specs."""
    return PARTITIONS.register(name)


@register("iid")
@dataclass(frozen=True)
class Iid(Partition):
    """Equal shares drawn at random."""

    def partitioner(self, clients: int, seed: int) -> Any:
        """Flower's."""
        return flower.IidPartitioner(clients)


@register("dirichlet")
@dataclass(frozen=True)
class DirichletShares(Partition):
    """Of each domain shares drawn from Dirichlet(alpha): small alphas make clients differ (arXiv 1909.06335, 3.1)."""

    alpha: float = 0.5
    min_rows: int = 8

    def __post_init__(self) -> None:
        check(self.alpha > 0, f"dirichlet alpha must be above 0, got {self.alpha}")
        check(self.min_rows >= 1, f"dirichlet min-rows must be at least 1, got {self.min_rows}")

    def partitioner(self, clients: int, seed: int) -> Any:
        """Flower's, which draws again until every client has ``min_rows``."""
        return flower.DirichletPartitioner(
            clients, OWNER, self.alpha, min_partition_size=self.min_rows, self_balancing=False, seed=seed
        )


@register("pathological")
@dataclass(frozen=True)
class Pathological(Partition):
    """So many domains a client, dealt out in turn (arXiv 1602.05629, section 3)."""

    classes: int = 1

    def __post_init__(self) -> None:
        check(self.classes >= 1, f"pathological classes must be at least 1, got {self.classes}")

    def check_clients(self, clients: int, owners: int) -> None:
        """Every domain must be with somebody."""
        super().check_clients(clients, owners)
        check(self.classes <= owners, f"pathological classes = {self.classes}, but there are {owners} domains")
        reached = clients + self.classes - 1
        check(reached >= owners, f"{clients} clients of {self.classes} domain(s) each leave some of {owners} to nobody")

    def partitioner(self, clients: int, seed: int) -> Any:
        """Flower's, in its deterministic mode: client i has the domains from i on."""
        return flower.PathologicalPartitioner(clients, OWNER, self.classes, "deterministic", seed=seed)


@register("natural")
@dataclass(frozen=True)
class Natural(Partition):
    """Each domain is one client."""

    def check_clients(self, clients: int, owners: int) -> None:
        """As many clients as domains."""
        check(clients == owners, f"partition 'natural' makes {owners} clients of {owners} domains, not {clients}")

    def partitioner(self, clients: int, seed: int) -> Any:
        """Flower's."""
        return flower.NaturalIdPartitioner(OWNER)

    def divide(self, rows: Dataset, clients: int, seed: int) -> list[list[int]]:
        """By domain, in the order in which the domains come in ``rows``, so that client 0 is the same in every seed."""
        shares = super().divide(rows, clients, seed)
        order = list(dict.fromkeys(rows[OWNER]))
        return sorted(shares, key=lambda share: order.index(rows[OWNER][share[0]]))


@register("size")
@dataclass(frozen=True)
class Sizes(Partition):
    """Shares drawn at random whose sizes grow from client to client: linear (1, 2, 3...), square or exponential."""

    growth: Literal["linear", "square", "exponential"] = "linear"

    def __post_init__(self) -> None:
        check_choices(self)

    def partitioner(self, clients: int, seed: int) -> Any:
        """Flower's."""
        made = {
            "linear": flower.LinearPartitioner,
            "square": flower.SquarePartitioner,
            "exponential": flower.ExponentialPartitioner,
        }
        return made[self.growth](clients)


def parse_partition(spec: str) -> Partition:
    """Build the partition that ``spec`` names; ``ConfigError`` names the part that is wrong, and what is near to it.

    >>> parse_partition("dirichlet:alpha=0.3")
    DirichletShares(alpha=0.3, min_rows=8)
    """
    name, values = read_spec(spec, "partition", spec)
    return from_mapping(PARTITIONS[name], {f"{name}:{key}": value for key, value in values.items()}, f"{name}:")


def describe(partition: Partition) -> str:
    """The first line of a partition's docstring, with its options."""
    options = ", ".join(f"{kebab(f.name)} {getattr(partition, f.name)}" for f in dataclasses.fields(partition))  # type: ignore[arg-type]
    line = (type(partition).__doc__ or "").partition("\n")[0]
    return f"{line} ({options})" if options else line
