"""What happened in a run: names of nodes, bytes, rounds, and every reply that was left out, with its reason."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, RecordDict

from offsite_fl.errors import OffsiteError, WireError
from offsite_fl.evaluation.ledger import Direction, Kind, Ledger
from offsite_fl.evaluation.rounds import Dropped, RoundRecord
from offsite_fl.wire import names
from offsite_fl.wire.records import count_bytes, records_of, text

# Under Flower's own logger, so that our lines go where its lines go.
log = logging.getLogger("flwr.offsite")


class NodeNames:
    """Flower node ids, which are random in every run, to the names that sites give themselves."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._claims: dict[int, str] = {}

    def learn(self, node: int, content: RecordDict) -> None:
        """Take the name out of a reply, if it has one; a name that another node has is made unique."""
        configs = records_of(content, ConfigRecord).values()
        claim = next((c.get(names.CLIENT) for c in configs if names.CLIENT in c), None)
        try:
            name = text(claim, names.CLIENT)[:100]
        except OffsiteError:
            return
        if not name or self._claims.get(node) == name:
            return
        if name in self._claims.values():
            log.warning("two nodes call themselves %s; give each its own name in its node config", name)
        self._names[node] = f"{name} (node {node})" if name in self._claims.values() else name
        self._claims[node] = name

    def namesakes(self, nodes: Iterable[int], connected: Container[int]) -> dict[int, str]:
        """Those of ``nodes`` whose name another node has, with what is to be said about it.

        A name whose node isn't ``connected`` any more, or has another one by now, goes over to the next one that claims
        it: a site that was started anew is another node.
        """
        refused = {}
        for node in nodes:
            claim = self._claims.get(node)
            if claim is None or self._names[node] == claim:
                continue
            holder = next((other for other, name in self._names.items() if name == claim), None)
            if holder is None:  # it has called itself something else since
                self._names[node] = claim
            elif holder in connected:
                refused[node] = (
                    f"another site is called {claim} too, and what a site keeps between rounds goes by its name: give "
                    "each site a name of its own in its node config"
                )
            else:
                self._names[holder], self._names[node] = f"{claim} (node {holder})", claim
        return refused

    def __getitem__(self, node: int) -> str:
        return self._names.get(node, f"node-{node}")


@dataclass
class Journal:
    """The record of a run; it goes into checkpoints and into the report."""

    ledger: Ledger = field(default_factory=Ledger)
    rounds: list[RoundRecord] = field(default_factory=list)
    nodes: NodeNames = field(default_factory=NodeNames)

    def learn(self, node: int, content: RecordDict) -> None:
        """Take a node's own name out of its reply; what was booked under its number before moves to that name."""
        before = self.nodes[node]
        self.nodes.learn(node, content)
        self.ledger.rename(before, self.nodes[node])

    def begin(self, server_round: int) -> RoundRecord:
        """Start the record of a round."""
        self.rounds.append(RoundRecord(server_round))
        return self.rounds[-1]

    def record(self, server_round: int) -> RoundRecord:
        """The record of the round that is under way."""
        if not self.rounds or self.rounds[-1].round != server_round:
            raise WireError(f"round {server_round} wasn't configured: configure_train comes first")
        return self.rounds[-1]

    def count(self, server_round: int, kind: Kind, direction: Direction, node: int, content: RecordDict) -> None:
        """Book the arrays of a message under ``kind`` and everything else of it under ``metrics``."""
        sizes = count_bytes(content)
        if sizes["arrays"]:
            self.ledger.add(server_round, kind, direction, self.nodes[node], sizes["arrays"])
        rest = sizes["metrics"] + sizes["config"]
        if rest:
            self.ledger.add(server_round, "metrics", direction, self.nodes[node], rest)

    def last_used(self, node: int, weight_key: str) -> int:
        """The last round whose aggregate has a reply of this node in it, 0 if there is none.

        Goes by the node's name, so it holds after a resume, where nodes have other numbers.
        """
        name = self.nodes[node]
        used = [r.round for r in self.rounds if not r.skipped and weight_key in r.clients.get(name, {})]
        return max(used, default=0)

    def namesakes(self, nodes: Iterable[int], connected: Container[int]) -> dict[int, str]:
        """See :meth:`NodeNames.namesakes`; what was booked for one that gets its name moves to that name."""
        before = {node: self.nodes[node] for node in nodes}
        refused = self.nodes.namesakes(before, connected)
        for node, name in before.items():
            self.ledger.rename(name, self.nodes[node])
        return refused

    def drop(self, server_round: int, node: int, reason: str) -> None:
        """Note that a node's reply isn't used."""
        log.warning("round %d: the reply of %s is left out: %s", server_round, self.nodes[node], reason)
        self.record(server_round).dropped.append(Dropped(self.nodes[node], reason))

    def clipped(self, server_round: int, count: int) -> None:
        """Note how many replies had their update scaled down to the bound."""
        if count:
            log.info("round %d: %d updates are scaled down to the bound", server_round, count)
        self.record(server_round).clipped = count

    def skip(self, server_round: int, reason: str) -> None:
        """Note that a round leaves the adapter as it was."""
        log.warning("round %d leaves the adapter as it was: %s", server_round, reason)
        record = self.record(server_round)
        record.skipped = True
        record.dropped.append(Dropped("aggregate", reason))
