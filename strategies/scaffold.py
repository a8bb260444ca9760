"""SCAFFOLD at the server: an average of the sites, and the control variate that their steps are corrected with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from offsite_fl import local
from offsite_fl.config import check
from offsite_fl.errors import WireError
from offsite_fl.local.algorithm import LocalAlgorithm
from offsite_fl.wire import names

from .combination import Doubles, as_record, combination, moved, numbers
from .factors import shares
from .local_strategy import LocalStrategy
from .work import DEFAULT_FACTOR, LR_SUM, OfWork, Work

FP32_MAX = float(np.finfo(np.float32).max)


class Scaffold(OfWork, LocalStrategy):
    """SCAFFOLD: control variates hold the sites' steps together where their data differ (arXiv 1910.06378).

    Algorithm 1 with option II. With S the sites that replied and N all sites,

        x <- x + eta * mean_S(y_i - x),     c <- c + |S| / N * mean_S(c_i+ - c_i).

    What a site does is in :class:`offsite_fl.local.Scaffold`, and so is how c_i+ - c_i follows from what the server
    has: y_i, which the bounds on updates hold, and the site's ``lr_sum``, which ``work_factor`` holds. An update that
    was scaled down counts so in c as well. It needs ``tune.optimizer = "sgd"``. N is the largest number of nodes that
    were connected at once so far. Where it grows, c shrinks with it, so that it stays the mean of all c_i, counting
    those of sites that never took part as zero.

    eta
        The server's learning rate; 1 averages.
    by_examples
        Weigh both means by the sites' examples as FedAvg does, where the paper weighs all sites the same.
    work_factor
        Replies whose ``lr_sum`` is more than this times the round's median, or less than the median by this factor, are
        dropped. Of two replies that differ by more, both are.
    """

    work_keys = (LR_SUM,)
    NOT_STATE = ("current",)

    def __init__(
        self, eta: float = 1.0, by_examples: bool = False, work_factor: float = DEFAULT_FACTOR, **options: Any
    ) -> None:
        super().__init__(**options)
        check(eta > 0, f"scaffold's eta must be above 0, got {eta}")
        self.eta, self.by_examples = eta, by_examples
        self.work_factor = Work(self.work_keys, work_factor).factor
        self.nodes = 0
        self.current: ArrayRecord | None = None
        self.control_sum: Doubles = {}

    def part(self, reference: Iterable[str]) -> LocalAlgorithm:
        """See :class:`LocalStrategy`."""
        return local.Scaffold()

    def control(self) -> Doubles:
        """c by the names of the adapter's tensors; empty before the first aggregation."""
        return {name: value / max(self.nodes, 1) for name, value in self.control_sum.items()}

    def carried(self, part: LocalAlgorithm, arrays: ArrayRecord, *, train: bool) -> ArrayRecord:
        """The adapter, and c beside it where sites tune."""
        if not train:
            return arrays
        control = self.control() or {name: np.zeros(array.shape) for name, array in arrays.items()}
        return ArrayRecord({**arrays, **as_record({names.CONTROL + name: control[name] for name in arrays})})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages; notes x, and how many nodes there are."""
        self.nodes = max(self.nodes, len(list(grid.get_node_ids())))
        self.current = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """New x and c from the replies; ``WireError`` if c would leave fp32, in which it travels."""
        contents = [reply.content for reply in replies if reply.has_content()]
        if not contents or self.current is None:
            return None, None
        weights = shares(numbers(contents, self.weighted_by_key) if self.by_examples else [1.0] * len(contents))
        arrays = moved(self.current, 1 - self.eta, combination(contents, [self.eta * w for w in weights], self.current))
        changes = combination(contents, [len(contents) * w for w in weights], [names.CONTROL + n for n in self.current])
        before = self.control_sum
        sums = {n: np.asarray(before.get(n, 0.0) + changes[names.CONTROL + n]) for n in self.current}
        if odd := [n for n, value in sums.items() if not bool((np.abs(value) <= FP32_MAX).all())]:
            raise WireError(f"the control variate of {odd[0]!r} would have values that aren't finite")
        self.control_sum = sums
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)
