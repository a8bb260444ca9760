"""The bundle goes to a node once: ask whether it has it, send only what it lacks, remember who confirmed.

Its own messages (``query.bundle``, ``train.bundle``), never a second array record in a train message: Flower's
aggregation and privacy mods take exactly one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from offsite_fl.bundle import Bundle
from offsite_fl.errors import OffsiteError
from offsite_fl.sizes import human_bytes
from offsite_fl.wire import names
from offsite_fl.wire.packs import PACK_BYTES, make_pack, plan_packs
from offsite_fl.wire.records import flag, texts

from .exchange import Answer, ask, config_of
from .journal import Journal, log

# What a node still lacks after the first pass (its cache was emptied meanwhile) is sent once more.
PASSES = 2


@dataclass
class Delivery:
    """Who holds the bundle of a run, and how the others get it.

    Memory is bounded by one message: a shard, or small files of at most ``pack_bytes`` together. All nodes that need
    it get the same array objects, which Flower stores once.
    """

    bundle: Bundle
    journal: Journal
    timeout: float = 3600.0
    pack_bytes: int = PACK_BYTES
    progress: bool = True
    confirmed: set[int] = field(default_factory=set)

    def ensure(self, grid: Grid, server_round: int, nodes: Iterable[int]) -> dict[int, str]:
        """Bring the bundle to all of ``nodes``; the result names those that couldn't get it, with the reason."""
        failed: dict[int, str] = {}
        missing = self._query(grid, server_round, sorted(set(nodes) - self.confirmed), failed)
        for _ in range(PASSES):
            if missing:
                self._send(grid, server_round, missing, failed)
        for node, files in missing.items():
            failed[node] = f"the bundle was sent, but {', '.join(sorted(files)[:3])} didn't arrive"
        return failed

    def forget(self, node: int) -> None:
        """A node's cache no longer has the bundle: ask it again before the next use."""
        self.confirmed.discard(node)

    def _query(self, grid: Grid, server_round: int, nodes: list[int], failed: dict[int, str]) -> dict[int, set[str]]:
        if not nodes:
            return {}
        question = RecordDict({names.CONFIG: ConfigRecord({names.DIGEST: self.bundle.digest})})
        asked = dict.fromkeys(nodes, question)
        good, bad = ask(grid, self.journal, server_round, "bundle", asked, names.QUERY_BUNDLE, self.timeout)
        missing: dict[int, set[str]] = {}
        for answer in good:
            self._note(answer, missing, failed)
        failed.update({answer.node: f"bundle query: {answer.reason}" for answer in bad if answer.node in asked})
        return missing

    def _send(self, grid: Grid, server_round: int, missing: dict[int, set[str]], failed: dict[int, str]) -> None:
        """Send the files in order, each message to the nodes that lack something of it."""
        sizes = {name: size for name, size, _ in self.bundle.files()}
        packs = plan_packs(sizes.items(), self.pack_bytes)
        for number, pack in enumerate(packs, 1):
            # A node that lacks the manifest can't know yet what else it lacks.
            wanting = [node for node, files in missing.items() if files & {packs[0][0], *pack}]
            if not wanting:
                continue
            if self.progress:
                size = human_bytes(sum(sizes[name] for name in pack))
                log.info("bundle: message %d of %d (%s) to %d node(s)", number, len(packs), size, len(wanting))
            content = make_pack(self.bundle.read_file, pack, self.bundle.digest)
            sent = dict.fromkeys(wanting, content)
            good, bad = ask(grid, self.journal, server_round, "bundle", sent, names.TRAIN_BUNDLE, self.timeout)
            for answer in good:
                missing.pop(answer.node, None)
                self._note(answer, missing, failed)
            for absent in bad:
                if missing.pop(absent.node, None) is not None:
                    failed[absent.node] = f"bundle delivery: {absent.reason}"

    def _note(self, answer: Answer, missing: dict[int, set[str]], failed: dict[int, str]) -> None:
        """Read an answer to a query or a delivery: held, or the names of what is still missing."""
        config = config_of(answer.message.content)
        try:
            if flag(config.get(names.HELD), names.HELD):
                self.confirmed.add(answer.node)
                return
            missing[answer.node] = set(texts(config.get(names.MISSING), names.MISSING))
        except OffsiteError as error:
            failed[answer.node] = f"bundle delivery: {error}"
            return
        if not missing[answer.node]:
            del missing[answer.node]
            failed[answer.node] = "bundle delivery: the node neither has the bundle nor lacks a file of it"
