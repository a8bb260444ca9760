"""The emulator's patch of a run: brought to the nodes before a message counts on it, and held against their replies.

Its own messages (``train.patch``), never a second array record in a train message: Flower's aggregation and privacy
mods take exactly one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ConfigRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from offsite_fl.errors import OffsiteError
from offsite_fl.evaluation.rounds import Dropped
from offsite_fl.patch import Patch
from offsite_fl.wire import names
from offsite_fl.wire.patches import make_patch

from .exchange import Answer, NoAnswer, ask, config_of
from .fedbiot import FedBiOT
from .journal import Journal, log
from .snapshot import nested_of


@dataclass
class Patching:
    """Who holds which patch, and how the others get it. Without a FedBiOT in the base there is nothing to do.

    ``lost`` is told the nodes that turn out to have lost the bundle itself.
    """

    source: FedBiOT | None
    journal: Journal
    timeout: float
    lost: Callable[[int], None]
    held: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Strategy, journal: Journal, timeout: float, lost: Callable[[int], None]) -> Patching:
        """For what is in ``base``."""
        return cls(next(iter(nested_of(base, FedBiOT)), None), journal, timeout, lost)

    @property
    def patch(self) -> Patch | None:
        """The patch that counts now."""
        return None if self.source is None else self.source.patch

    @property
    def digest(self) -> str | None:
        """Its digest."""
        found = self.patch
        return None if found is None else found.digest

    def renew(self, server_round: int, adapter: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Align the emulator with the adapter that a round is about to broadcast.

        Where that fails the patch stays as it was, the round's record says so, and the round goes on. Before round 1 it
        is an error: there the adapter is the owner's own, so it is the options that don't work.
        """
        if self.source is None:
            return
        try:
            self.source.align(server_round, adapter)
        except (OffsiteError, ValueError) as error:  # peft merges no NaN: a ValueError
            if server_round == 1:
                raise
            log.warning("round %d: the emulator keeps its patch from before: %s", server_round, error)
            left = Dropped("alignment", f"the emulator keeps its patch from before: {error}")
            self.journal.record(server_round).dropped.append(left)

    def check_aggregate(self, adapter: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """``OffsiteError`` if the emulator can't work with an aggregated adapter."""
        if self.source is not None:
            self.source.check_aggregate(adapter)

    def ensure(self, grid: Grid, server_round: int, nodes: Iterable[int]) -> dict[int, str]:
        """Bring the patch to those of ``nodes`` that lack it; the result names those that couldn't get it, and why."""
        patch = self.patch
        wanting = [] if patch is None else sorted(node for node in nodes if self.held.get(node) != patch.digest)
        if self.source is None or patch is None or not wanting:
            return {}
        sent = dict.fromkeys(wanting, make_patch(patch, self.source.public))
        good, bad = ask(grid, self.journal, server_round, "patch", sent, names.TRAIN_PATCH, self.timeout)
        failed = {absent.node: f"patch delivery: {absent.reason}" for absent in bad if absent.node in sent}
        for absent in bad:
            if absent.code == names.BUNDLE_MISSING:
                self.lost(absent.node)
        for answer in good:
            said = config_of(answer.message.content).get(names.PATCH)
            if said == patch.digest:
                self.held[answer.node] = patch.digest
            else:
                failed[answer.node] = f"patch delivery: the node keeps {_short(said)}, {_short(patch.digest)} was sent"
        return failed

    def sign(self, config: ConfigRecord) -> None:
        """Say in a message's config which patch it counts on."""
        digest = self.digest
        if digest is not None:
            config[names.PATCH] = digest

    def checked(self, answer: Answer) -> Answer | NoAnswer:
        """``answer``, or why it can't be used: its node's emulator wasn't the server's, so it gets the patch again."""
        said, wanted = config_of(answer.message.content).get(names.PATCH), self.digest
        if said == wanted:
            return answer
        self.forget(answer.node)
        return NoAnswer(answer.node, f"its emulator had patch {_short(said)}, the server's has {_short(wanted)}")

    def forget(self, node: int) -> None:
        """A node no longer has the patch: send it before the next use."""
        self.held.pop(node, None)


def _short(digest: object) -> str:
    return ascii(digest)[1:13] if isinstance(digest, str) else "none"
