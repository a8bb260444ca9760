"""The federation that attacks are measured in: the pico model, five data owners, training that is remembered."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from flwr.app import Context, Message, RecordDict

from offsite_fl.client_app import make_client_app
from offsite_fl.config import TuneConfig
from offsite_fl.data.examples import to_examples
from offsite_fl.data.sources import load_source
from offsite_fl.errors import DataError
from offsite_fl.evaluation.rows import Row
from offsite_fl.measure import Measure
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.strategies import OffsiteTuning
from offsite_fl.strategies.named import make_strategy
from offsite_fl.wire.records import only_arrays, only_config
from offsite_fl.wire.settings import server_round
from simulations.attacks import Threat, flip
from simulations.in_process import Client, InProcessGrid, separate, task_identity
from simulations.pico import pico_folder
from simulations.texts import books_folder

# Four parts of the Bible, the largest of them in two by its books: no two owners have the same domain.
OWNERS = ("wisdom", "isaiah", "prophets", "gospels", "letters")
EMULATOR = "layer-drop:keep=6"
BLOCK = 128
# Replies that are kept, a few megabytes each: those of the first round, which all cells share, and those of late.
KEPT = 150


def owners_texts() -> list[Dataset]:
    """A dataset for each of ``OWNERS``."""
    files = {
        stem: load_source(books_folder() / f"{stem}.jsonl") for stem in ("wisdom", "prophets", "gospels", "letters")
    }
    early = {"Isaiah", "Jeremiah"}
    parts = {
        "isaiah": files["prophets"].filter(lambda row: row["title"] in early),
        "prophets": files["prophets"].filter(lambda row: row["title"] not in early),
    }
    return [parts.get(name, files.get(name)) for name in OWNERS]


class World:
    """Model owner, bundle, data owners and test set of all cells; ``seed`` draws the order of the data.

    All worlds of a process share ``workdir``: it keeps one network open, whose files are in the cache there.
    """

    def __init__(self, workdir: Path, seed: int, rounds: int, steps: int, test_tokens: int, attacker: int) -> None:
        self.rounds, self.attacker = rounds, attacker
        self.tune = TuneConfig(
            max_steps=steps,
            schedule_steps=rounds * steps,
            schedule="cosine",
            lr=3e-3,
            batch_size=2,
            block_size=BLOCK,
            seed=seed,
            progress=False,
            device="cpu",
        )
        self.owner = ModelOwner.from_pretrained(pico_folder(), Split.parse("2-2"))
        self.owner.make_bundle(EMULATOR, workdir / f"bundle-{seed}", calibration=books_folder() / "public.txt")
        test = books_folder() / "test.jsonl"
        self.measure = Measure(self.owner, test, block_size=BLOCK, max_tokens=test_tokens, device="cpu")
        words = self.owner.tokenizer
        honest = [to_examples(text, words, block_size=BLOCK) for text in owners_texts()]
        poisoned = {**dict(enumerate(honest)), attacker: flip(honest[attacker], len(words))}
        cache = workdir / "cache"
        self.clients = {
            False: Remembering(make_client_app(lambda c: honest[_partition(c)], cache=cache)),
            True: Remembering(make_client_app(lambda c: poisoned[_partition(c)], cache=cache)),
        }

    def run(self, attack: str, base: str, options: dict[str, float]) -> OffsiteTuning:
        """One federation; ``attack`` "" leaves everybody honest."""
        threat = Threat(attack, (self.attacker,)) if attack else None
        train = self.clients[threat is not None and threat.behaviour.flips_labels]

        def client(message: Message, context: Context) -> Message:
            if threat is None or message.metadata.message_type != "train":
                return train(message, context)
            return threat.mod(message, context, train)

        count = {f"min_{what}_nodes": len(OWNERS) for what in ("train", "evaluate", "available")}
        strategy = OffsiteTuning(
            make_strategy(base, fraction_evaluate=0.0, **count), self.owner, tune=self.tune, progress=False, **options
        )
        quiet = logging.getLogger("flwr")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            with task_identity():
                strategy.start(InProcessGrid.of_partitions(client, OWNERS), num_rounds=self.rounds)
        finally:
            quiet.setLevel(level)
        return strategy

    @property
    def attacker_name(self) -> str:
        """What the attacker is called."""
        return OWNERS[self.attacker]

    def untuned(self) -> float:
        """Loss of the full model as it is."""
        return _loss(self.measure.full_zero_shot())

    def loss(self, strategy: OffsiteTuning) -> float:
        """Plug-in loss in nats per token on text of all owners."""
        return _loss(self.measure.plug_in(strategy.state))


def _loss(row: Row) -> float:
    if row.loss is None:
        raise DataError("the plug-in has no finite loss to put into a table")
    return row.loss


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


class Remembering:
    """A client app whose training isn't done twice: the same client, round and received values give the same reply."""

    def __init__(self, app: Client) -> None:
        self.app = app
        self.known: OrderedDict[tuple[int, int, str], RecordDict] = OrderedDict()

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply of the app, computed or remembered."""
        if message.metadata.message_type != "train":
            return self.app(message, context)
        config, arrays = only_config(message.content)[1], only_arrays(message.content)[1]
        digest = hashlib.sha256(b"".join(array.data for array in arrays.values())).hexdigest()
        place = (_partition(context), server_round(config), digest)
        if place not in self.known:
            reply = self.app(message, context)
            if not reply.has_content():
                return reply
            self.known[place] = reply.content
            if len(self.known) > KEPT:
                self.known.popitem(last=False)
        self.known.move_to_end(place)
        return Message(separate(self.known[place]), reply_to=message)
