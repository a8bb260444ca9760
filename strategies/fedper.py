"""FedPer: some adapter blocks are personal, and stay at the sites."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from flwr.app import ArrayRecord, Message, MetricRecord

from offsite_fl import local
from offsite_fl.errors import ConfigError
from offsite_fl.local.algorithm import LocalAlgorithm
from offsite_fl.models.head import is_head

from .local_strategy import LocalStrategy


class FedPer(LocalStrategy):
    """FedPer: the adapter blocks in the slots ``personal`` never leave the sites (arXiv 1912.00818).

    The other blocks, and the head where one is trained, are averaged by examples, as under FedAvg. Personal blocks
    travel neither way, so the run's result and the plug-in hold their initial values: the plug-in is the shared part
    alone, and what a site itself has is told by the sites' evaluation. See :class:`offsite_fl.local.FedPer` for what a
    site does.

    personal
        Slots, several with a slash between them as in ``0/3``; ``last`` is the highest, next to the head.
    """

    of_mean: ClassVar[bool] = True  # of the replies it needs no more than their mean, so it can go with streaming
    NOT_STATE: ClassVar[tuple[str, ...]] = ("whole",)

    def __init__(self, personal: str = "last", **options: Any) -> None:
        super().__init__(**options)
        self.personal = personal
        self.whole: ArrayRecord | None = None

    @property
    def note(self) -> str:
        """What a reader of the run's numbers must know."""
        return (
            f"The adapter blocks {self.personal} (fedper) stay at the data owners: the plug-in holds their initial "
            "values, and only the data owners' own evaluation is about their whole adapters."
        )

    def part(self, reference: Iterable[str]) -> local.FedPer:
        """See :class:`LocalStrategy`."""
        names = list(reference)
        there = sorted({int(name.split(".")[1]) for name in names if not is_head(name)})
        head = any(is_head(name) for name in names)
        if self.personal == "last":
            return self._leaving_some((there[-1],), there, head)
        asked = self.personal.split("/")
        if not all(slot.isdecimal() and int(slot) in there for slot in asked):
            known = ", ".join(map(str, there))
            raise ConfigError(f"fedper:personal={self.personal} must be last or slots of the adapter; it has {known}")
        return self._leaving_some(tuple(sorted({int(slot) for slot in asked})), there, head)

    def _leaving_some(self, personal: tuple[int, ...], there: list[int], head: bool) -> local.FedPer:
        if set(personal) == set(there) and not head:
            raise ConfigError(f"fedper:personal={self.personal} leaves no adapter block to share; it has {len(there)}")
        return local.FedPer(personal)

    def carried(self, part: LocalAlgorithm, arrays: ArrayRecord, *, train: bool) -> ArrayRecord:
        """The shared blocks."""
        if train:
            self.whole = arrays
        personal = set(part.keeps(arrays))
        return ArrayRecord({name: array for name, array in arrays.items() if name not in personal})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg of the shared blocks, with the personal ones as they were."""
        shared, metrics = super().aggregate_train(server_round, replies)
        if shared is None or self.whole is None:
            return None, metrics
        return ArrayRecord({name: shared.get(name, array) for name, array in self.whole.items()}), metrics
