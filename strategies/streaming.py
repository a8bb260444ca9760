"""The weighted mean of a round, folded in reply by reply, and the step that a strategy takes on it.

One fp64 sum is held, however many data owners reply. The wrapped strategy then gets the mean as the only reply of the
round, so whatever it does with a mean (FedAvgM's momentum, FedAdam's moments) is done by its own lines.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Strategy

from offsite_fl.errors import ConfigError
from offsite_fl.wire import names
from offsite_fl.wire.codecs import encode
from offsite_fl.wire.records import only_metrics

from .journal import log
from .named import STRATEGIES
from .screening import Tensors, with_records

# Classes of Flower whose ``aggregate_train`` is a function of the weighted mean; FedProx has FedAvg's.
OF_MEAN: tuple[type[Strategy], ...] = (FedAvg, FedAvgM, FedAdam, FedAdagrad, FedYogi)


def is_of_mean(kind: type) -> bool:
    """Whether ``kind.aggregate_train`` needs no more of the replies than their weighted mean.

    A class of our own says so by ``of_mean = True``. It counts only in the class that defines ``aggregate_train``: one
    that overrides it, as Krum does FedAvg's, inherits no promise.
    """
    author = next(each for each in inspect.getmro(kind) if "aggregate_train" in vars(each))
    return author in OF_MEAN or vars(author).get("of_mean") is True


def check_of_mean(base: Strategy) -> None:
    """``ConfigError`` unless ``base`` works with streaming."""
    if is_of_mean(type(base)):
        return
    known = [name for name in STRATEGIES if inspect.isclass(kind := STRATEGIES[name]) and is_of_mean(kind)]
    raise ConfigError(
        f"{type(base).__name__} needs all replies of a round at once, so it can't go with streaming; "
        f"these can: {', '.join(known)}, and classes that define aggregate_train and of_mean = True"
    )


class StreamingMean:
    """``sum_i w_i x_i / sum_i w_i`` by tensor name, in fp64.

    The order of the replies changes nothing beyond the rounding of fp64 sums, which rounding to fp32 hides nearly
    always.
    """

    def __init__(self) -> None:
        self.weight = 0.0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        """Fold one reply in: fp32 tensors, the same names and shapes each time, and a weight above 0."""
        for name, tensor in tensors.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            self._sums[name].add_(tensor, alpha=weight)
        self.weight += weight

    def take(self) -> dict[str, torch.Tensor]:
        """The mean in fp32. Empties the sums, so that both are never held at once."""
        return {name: (self._sums.pop(name).div_(self.weight)).float() for name in tuple(self._sums)}


def step(
    base: Strategy, server_round: int, mean: StreamingMean, replies: Sequence[Message], weight_key: str
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """``base``'s own aggregation of the mean. ``replies`` have the metrics of those that are in it, and no arrays.

    The only reply has the weight of all. ``base.train_metrics_aggr_fn`` is called once, as ever, on the metrics of all.
    """
    records = _alike([only_metrics(reply.content)[1] for reply in replies], server_round, weight_key)
    tensors = mean.take()
    arrays = encode(tensors, tensors, "fp32")[0]
    del tensors
    metrics = MetricRecord({**_means(records, weight_key), weight_key: mean.weight})
    only = with_records(replies[0], {names.ARRAYS: arrays, names.METRICS: metrics})
    del arrays
    with _metrics_of(base, [RecordDict({names.METRICS: record}) for record in records]):
        return base.aggregate_train(server_round, [only])


def _alike(records: list[MetricRecord], server_round: int, weight_key: str) -> list[MetricRecord]:
    """The records that have every metric; where none has, of all of them the weight, which is in every one."""
    every = set[str]().union(*records)
    whole = [record for record in records if record.keys() == every]
    if len(whole) < len(records):
        lacking = sorted(set[str]().union(*(every - record.keys() for record in records)))
        log.info(
            "round %d: %d of %d replies count without their metrics: they lack one of %s, which most others have",
            server_round,
            len(records) - len(whole),
            len(records),
            ", ".join(map(ascii, lacking)),
        )
    return whole or [MetricRecord({weight_key: record[weight_key]}) for record in records]


def _means(records: Sequence[MetricRecord], weight_key: str) -> dict[str, float]:
    """The weighted mean of each metric, for strategies that know no function for it."""
    weights = [float(record[weight_key]) for record in records]  # type: ignore[arg-type]
    total = sum(weights)
    values = {name: [float(record[name]) for record in records] for name in records[0]}  # type: ignore[arg-type]
    return {name: sum(w * v for w, v in zip(weights, each, strict=True)) / total for name, each in values.items()}


@contextmanager
def _metrics_of(base: Strategy, records: list[RecordDict]) -> Iterator[None]:
    """While this lasts, ``base`` aggregates the metrics of ``records`` in place of those in the replies it gets."""
    own = getattr(base, "train_metrics_aggr_fn", None)
    if own is None:
        yield
        return
    vars(base)["train_metrics_aggr_fn"] = lambda _, key: own(records, key)
    try:
        yield
    finally:
        vars(base)["train_metrics_aggr_fn"] = own
