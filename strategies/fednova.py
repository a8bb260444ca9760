"""FedNova: sites that take more steps don't pull the average their way."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from offsite_fl.errors import WireError

from .combination import combination, moved, numbers
from .factors import shares
from .work import DEFAULT_FACTOR, LR_SUM, STEPS, OfWork, Work


class FedNova(OfWork, FedAvg):
    """FedNova: averages the directions of the sites, however many local steps each took (arXiv 2007.07481).

    Equation 5 of the paper, with x as it was sent and p_i the sites' shares of the examples,

        x <- x - tau_eff * sum_i p_i (x - y_i) / |a_i|_1,     tau_eff = sum_i p_i |a_i|_1.

    Plain averaging with unequal steps goes to the minimum of another objective than ``sum p_i F_i``. ``|a_i|_1`` is
    how far a constant gradient would have taken a site: the sum of its learning rates, which the reply's metric
    ``lr_sum`` tells, so that sites with unequal learning rates or schedules are evened out as well. Under SGD with a
    proximal term it has the paper's form for that. For AdamW the sum of learning rates stands in, because the length of
    its steps hardly depends on that of the gradient. Replies without ``lr_sum``, of other client apps, are
    counted by ``steps``. ``head_lr_scale`` isn't in ``lr_sum``: the same one at all sites only makes the head's steps
    longer, as it is meant to, but a site with twice the scale of the others counts twice as much in the head.

    work_factor
        Inside :class:`~offsite_fl.strategies.OffsiteTuning`, replies whose work is more than this times the round's
        median, or less than the median by this factor, are dropped. Of two replies that differ by more, both are. A
        claim within it can still count for up to that many times its update: a bound on updates is loose by as much.
    """

    work_keys = (LR_SUM, STEPS)
    NOT_STATE = ("current",)

    def __init__(self, work_factor: float = DEFAULT_FACTOR, **options: Any) -> None:
        super().__init__(**options)
        self.work_factor = Work(self.work_keys, work_factor).factor
        self.current: ArrayRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages."""
        self.current = arrays
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The normalised average; ``WireError`` if a reply doesn't tell its work."""
        contents = [reply.content for reply in replies if reply.has_content()]
        if not contents or self.current is None:
            return None, None
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        key = next((key for key in self.work_keys if key in metrics), None)
        if key is None:
            raise WireError(f"FedNova needs the metric {LR_SUM!r} or {STEPS!r} in the replies")
        parts, work = shares(numbers(contents, self.weighted_by_key)), numbers(contents, key)
        if min(work) <= 0:
            raise WireError(f"metric {key!r} must be above 0, a reply has {min(work):g}")
        effective = sum(p * w for p, w in zip(parts, work, strict=True))
        weights = [p * effective / w for p, w in zip(parts, work, strict=True)]
        # x - tau_eff sum p_i (x - y_i) / w_i, with the factors of x put together
        return moved(self.current, 1 - sum(weights), combination(contents, weights, self.current)), metrics
