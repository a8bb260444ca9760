"""The data owner as a Flower ClientApp: receives a bundle once, tunes the adapter each round, sends back the update.

Works in simulation and deployment. In a deployment every message starts a new process, so the bundle lives in a disk
cache and is memory-mapped; in simulation one opened network is shared by all virtual clients of a worker process.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from flwr.app import Array, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable, Mod

from offsite_fl.bundle import Cache
from offsite_fl.config import TuneConfig, cache_root
from offsite_fl.data.examples import split_examples
from offsite_fl.data.fingerprints import Fingerprints, overlap
from offsite_fl.data.sources import Source
from offsite_fl.data_owner import DataOwner, adapter_blocks
from offsite_fl.errors import DataError, OffsiteError, WireError
from offsite_fl.local.algorithm import LocalAlgorithm, Outcome, read_algorithm
from offsite_fl.local.patch_store import PatchStore
from offsite_fl.local.public_question import PublicQuestion, admit
from offsite_fl.local.turn import Turn, loss_of
from offsite_fl.models.head import is_head
from offsite_fl.tuning.lora import expected_factors
from offsite_fl.wire import names
from offsite_fl.wire.backed import check_backed
from offsite_fl.wire.codecs import decode, encode
from offsite_fl.wire.packs import read_pack
from offsite_fl.wire.patches import read_patch
from offsite_fl.wire.reasons import without_folders
from offsite_fl.wire.records import only_arrays, only_config, text
from offsite_fl.wire.replies import beginning, for_reply, references
from offsite_fl.wire.settings import client_seed, tune_from_config, tune_of_run

log = logging.getLogger("flwr.offsite")

Data = Source | tuple[Source, Source]
LoadData = Callable[[Context], Data]
NameSite = Callable[[Context], str | None]
_Examples = tuple[Dataset, Dataset | None]  # to tune on, and to watch


class BundleMissing(OffsiteError):
    """The bundle that a message is about isn't in this site's cache (any more)."""


class PatchMissing(OffsiteError):
    """The patch of the emulator that a message counts on isn't in this site's cache, or isn't whole there."""


class PublicOverlap(OffsiteError):
    """This site holds an example of the public text that the server aligns the emulator on.

    That it does is one bit, the answer to a question that the server put. :mod:`offsite_fl.local.public_question` sees
    to it that a site answers no second one.
    """


class NoValidation(OffsiteError):
    """This site holds no data back to evaluate on."""


# What is wrong with a site's data is told by line and column, and with the site's own paths: not for the server.
WITHHELD = "this site's data can't be used; the reason is in the site's own log"
HIDDEN = "what went wrong is in the site's own log"

CODES: dict[type[OffsiteError], int] = {
    BundleMissing: names.BUNDLE_MISSING,
    PatchMissing: names.PATCH_MISSING,
    NoValidation: names.NO_VALIDATION,
}


def make_client_app(
    load_data: LoadData | None = None,
    *,
    name: NameSite | None = None,
    train_mods: Sequence[Mod] = (),
    cache: Cache | str | Path | None = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """A ClientApp for one site, or for all virtual clients of a simulation.

    Parameters
    ----------
    load_data
        Gets the Flower context and gives a file, a ``datasets.Dataset``, or ``(train, validation)`` of these. None
        reads the path ``data`` (and ``validation-data``, if set) from the node config, so that a site needs no code.
    name
        Gets the Flower context and names the site in logs and reports; None, or a result of None, takes ``name`` of the
        node config, else ``client-<partition-id>``, else the node id.
    train_mods
        Flower mods around tuning only, for instance ``[fixedclipping_mod]``. Never give privacy mods to a whole app:
        they answer queries and bundle messages with errors.
    cache
        Where bundles are kept: a :class:`~offsite_fl.bundle.Cache` or its folder. None takes ``cache-dir`` of the node
        config, else ``OFFSITE_FL_CACHE``, else ``~/.cache/offsite-fl``.
    mods
        Flower mods around everything, bundle messages included, that hand messages on as they are: for instance one
        that gives ``load_data`` another context.

    Notes
    -----
    A site sets in its node config what is its own business: ``name``, ``data``, ``cache-dir``, ``cache-bytes``,
    ``state-dir`` (where it keeps everything but bundles; ``cache-dir`` without it) and ``tune.*`` settings such as
    ``tune.device`` or ``tune.batch-size``.
    """
    local_noise = any(isinstance(mod, LocalDpMod) for mod in train_mods)
    site = _Site(load_data or load_from_node_config, name or client_name, cache, local_noise)
    answering = functools.partial(_answering, folders=site.folders)

    def guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        return answering(call_next)(message, context)  # for what the other mods raise

    app = ClientApp(mods=[guard, *mods])
    app.query(names.BUNDLE_ACTION)(answering(site.query_bundle))
    app.train(names.BUNDLE_ACTION)(answering(site.store_bundle))
    app.train(names.PATCH_ACTION)(answering(site.store_patch))
    app.train(mods=list(train_mods))(answering(site.tune))
    app.evaluate()(answering(site.evaluate))
    return app


def load_from_node_config(context: Context) -> Data:
    """The default loader: files named by ``data`` and ``validation-data`` in the node config."""
    path, held_out = context.node_config.get("data"), context.node_config.get("validation-data")
    if not isinstance(path, str):
        raise DataError(
            "this site names no data file: start its SuperNode with --node-config 'data=\"/path/to/file.jsonl\"', "
            "or give make_client_app a load_data function"
        )
    return (path, held_out) if isinstance(held_out, str) else path


def client_name(context: Context) -> str:
    """What this site is called in logs and reports: ``name`` in the node config, else by partition or node."""
    config = context.node_config
    if "name" in config:
        return text(config["name"], "name")
    return f"client-{config['partition-id']}" if "partition-id" in config else f"node-{context.node_id}"


def _answering(handler: ClientAppCallable, folders: Callable[[Context], list[str]]) -> ClientAppCallable:
    """Turn errors into error replies, whose reason the server logs.

    Of an error in the site's data only that there is one leaves the site. Our own errors tell what was wrong, without
    this site's ``folders``; of any other, as of code that loads data, the server gets the name of its type.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except OffsiteError as error:
            code, reason = CODES.get(type(error), names.REFUSED), without_folders(str(error), folders(context))
            if isinstance(error, DataError):
                log.error("this site's data can't be used: %s", error)
                reason = WITHHELD
            elif reason != str(error):
                log.error("the server was told this without the folders: %s", error)
            return Message(Error(code, f"{type(error).__name__}: {reason}"), reply_to=message)
        except Exception as error:  # Flower would send its text, which may hold paths and data
            log.exception("this site couldn't answer")
            return Message(Error(names.REFUSED, f"{type(error).__name__}: {HIDDEN}"), reply_to=message)

    return answer


@dataclass(frozen=True)
class _Task:
    """A train or evaluate message, read. ``tune`` is how this site tunes, ``run`` what the server asked of all.

    ``algorithm`` is what to do other than plain tuning, if anything. ``public``: of the examples that the emulator was
    aligned on.
    """

    owner: DataOwner
    config: ConfigRecord
    arrays_key: str
    tune: TuneConfig
    run: TuneConfig
    codec: str
    reference: Mapping[str, torch.Tensor]
    start: Mapping[str, torch.Tensor]
    algorithm: LocalAlgorithm | None
    public: Fingerprints | None

    def notes(self, site: str) -> dict[str, Any]:
        """What every reply says of itself: who sends it, for which bundle, and which factors its emulator had."""
        notes: dict[str, Any] = {names.CLIENT: site, names.DIGEST: self.owner.bundle.digest}
        digest = self.owner.patch_digest
        return notes if digest is None else {**notes, names.PATCH: digest}


class _Site:
    """The handlers of one ClientApp."""

    def __init__(
        self, load_data: LoadData, name: NameSite, cache: Cache | str | Path | None, local_noise: bool
    ) -> None:
        self.load_data, self.given_name, self.given_cache, self.local_noise = load_data, name, cache, local_noise

    def name(self, context: Context) -> str:
        """What this site is called."""
        return self.given_name(context) or client_name(context)

    def _lasting_name(self, context: Context) -> str:
        """The name, or "" where it is made of the node's number, which the server gives anew to whom it likes."""
        name = self.name(context)
        return "" if name == f"node-{context.node_id}" else name

    def folders(self, context: Context) -> list[str]:
        """Paths of this site that errors may name."""
        cache = self.given_cache or context.node_config.get("cache-dir")
        root = cache.root if isinstance(cache, Cache) else cache_root(str(cache) if cache else None)
        keys = ("cache-dir", "state-dir", "data", "validation-data")
        told = [str(context.node_config.get(key, "")) for key in keys]
        paths = [root, *(Path(each) for each in told if each)]
        return [str(form) for path in paths for form in (path.absolute(), path.resolve()) if len(form.parts) > 1]

    # The bundle ------------------------------------------------------------------------------------------------

    def query_bundle(self, message: Message, context: Context) -> Message:
        """Say whether the bundle is here, and if not, which files are still to come."""
        digest = text(only_config(message.content)[1].get(names.DIGEST), names.DIGEST)
        return self._state(message, context, digest)

    def store_bundle(self, message: Message, context: Context) -> Message:
        """Keep the files of one message; the last one completes the bundle."""
        digest, files = read_pack(message.content)
        cache = self._cache(context)
        if cache.find(digest) is None:
            incoming = cache.receiver(digest, self.name(context))
            for name, data in files:
                incoming.store(name, data)
            if not incoming.missing():
                incoming.commit()
        return self._state(message, context, digest)

    def store_patch(self, message: Message, context: Context) -> Message:
        """Keep factors for the emulator of a bundle that is here, and say which ones are on the disk now."""
        found, cache = read_patch(message.content), self._cache(context)
        if cache.find(found.patch.bundle) is None:
            raise BundleMissing(f"bundle {found.patch.bundle[:12]}, which a patch is for, isn't in the cache")
        if found.patch.digest != found.digest:
            raise WireError(f"the patch was damaged on its way: its digest is {found.patch.digest[:12]}")
        held = PatchStore(self._kept(context), found.patch.bundle, self.name(context)).keep(found.patch, found.public)
        state: dict[str, Any] = {names.DIGEST: found.patch.bundle, names.PATCH: held, names.CLIENT: self.name(context)}
        return Message(RecordDict({names.CONFIG: ConfigRecord(state)}), reply_to=message)

    def _state(self, message: Message, context: Context, digest: str) -> Message:
        cache, name = self._cache(context), self.name(context)
        held = cache.find(digest) is not None
        state: dict[str, Any] = {names.DIGEST: digest, names.CLIENT: name, names.HELD: held}
        if not held:
            state[names.MISSING] = cache.receiver(digest, name).missing()
        return Message(RecordDict({names.CONFIG: ConfigRecord(state)}), reply_to=message)

    def _cache(self, context: Context) -> Cache:
        if isinstance(self.given_cache, Cache):
            return self.given_cache
        folder = self.given_cache or context.node_config.get("cache-dir")
        size = context.node_config.get("cache-bytes")
        return Cache(
            str(folder) if folder else None, size if isinstance(size, (int, str)) and size is not True else None
        )

    def _kept(self, context: Context) -> Path:
        """Where the site keeps what it is asked to remember: patches, state between rounds, the question it answered.

        Its operator says so, never a message: a simulation of one's own takes a folder for each run.
        """
        folder = context.node_config.get("state-dir")
        return cache_root(str(folder)) if folder else self._cache(context).root

    # Tuning and evaluation -------------------------------------------------------------------------------------

    def tune(self, message: Message, context: Context) -> Message:
        """Tune the received adapter on this site's data and send it back in the same form."""
        with _networks.lock:
            task = self._read(message, context)
            data = self._data(task, context)
            done = self._tuned(task, data, context)
            said = task.notes(self.name(context))
        arrays, notes = encode(done.tensors, references(done.tensors, task.reference), task.codec)
        config = ConfigRecord({**notes, **said})
        config[names.EVALUATES] = data[1] is not None
        if task.algorithm is not None:
            config[names.ALGORITHM] = task.algorithm.name
        # train_loss with an underscore is what Flower's QFedAvg asks for
        measured = {name.replace("-", "_"): value for name, value in done.metrics.items()}
        metrics = MetricRecord({names.NUM_EXAMPLES: done.num_examples, **measured})
        return Message(
            RecordDict({task.arrays_key: arrays, names.METRICS: metrics, names.CONFIG: config}), reply_to=message
        )

    def _tuned(self, task: _Task, data: _Examples, context: Context) -> Outcome:
        if task.algorithm is not None:
            return self._turn(task.algorithm, task, data, context).take()
        start = beginning(task.start, task.tune, task.run)
        update = task.owner.tune(data[0], task.tune, validation=data[1], start=start, merge=False)
        tensors = for_reply(update.tensors, task.start, task.run, whole=self._private(task.config))
        return Outcome(tensors, update.num_examples, update.metrics)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Loss of the emulator with the received adapter on this site's validation data."""
        with _networks.lock:
            task = self._read(message, context)
            data = self._data(task, context)
            validation = data[1]
            if validation is None:
                raise NoValidation("this site has no validation data: set tune.validation-share or validation-data")
            if task.algorithm is not None:
                measured = task.algorithm.evaluate(self._turn(task.algorithm, task, data, context))
            else:
                measured = {names.LOSS: loss_of(task.owner, task.start, validation, task.tune, task.run)}
            config = ConfigRecord(task.notes(self.name(context)))
        metrics = MetricRecord({**measured, names.NUM_EXAMPLES: len(validation)})
        return Message(RecordDict({names.METRICS: metrics, names.CONFIG: config}), reply_to=message)

    def _turn(self, algorithm: LocalAlgorithm, task: _Task, data: _Examples, context: Context) -> Turn:
        return Turn.of(
            algorithm,
            task.config,
            owner=task.owner,
            settings=task.tune,
            run=task.run,
            received=task.start,
            codec=task.codec,
            reference=task.reference,
            data=data,
            cache=self._kept(context),
            site=self.name(context),
        )

    def _read(self, message: Message, context: Context) -> _Task:
        arrays_key, arrays = only_arrays(message.content)
        config = only_config(message.content)[1]
        digest = text(config.get(names.DIGEST), names.DIGEST)
        codec = text(config.get(names.CODEC, "fp32"), names.CODEC)
        if codec != "fp32" and self._private(config):
            raise WireError(f"codec {codec!r} hides the values from the privacy mod, which needs fp32")
        tune, run = tune_from_config(config, context.node_config, self.name(context)), tune_of_run(config)
        if run.lora_fresh and self._private(config):
            raise WireError("a privacy mod compares a reply with its message, but fresh LoRA factors are other tensors")
        owner = _networks.open(self._cache(context), digest, tune)
        owner.reset()  # nothing of another virtual client's round may stay
        public = self._patch(owner, config, context)
        known = _reference(owner, run, arrays)
        algorithm = read_algorithm(config)
        if algorithm is not None:
            known = self._travelling(algorithm, known, message)
        # In the order of the message: Flower's privacy mods compare the lists of keys.
        reference = {name: known[name] for name in [*(n for n in arrays if n in known), *known]}
        start = decode(arrays, config, reference, codec)
        return _Task(owner, config, arrays_key, tune, run, codec, reference, start, algorithm, public)

    def _patch(self, owner: DataOwner, config: ConfigRecord, context: Context) -> Fingerprints | None:
        """Give the emulator the factors that the message counts on, none if it names none."""
        owner.patch(None)
        if names.PATCH not in config:
            return None
        digest = text(config[names.PATCH], names.PATCH)
        found = PatchStore(self._kept(context), owner.bundle.digest, self.name(context)).find(digest)
        if found is None:
            raise PatchMissing(f"the patch {digest[:12]} of the emulator isn't here, or is damaged")
        owner.patch(found[0])
        return found[1]

    def _travelling(
        self, algorithm: LocalAlgorithm, known: Mapping[str, torch.Tensor], message: Message
    ) -> dict[str, torch.Tensor]:
        """What ``message`` carries of the run's state, and beside it."""
        if message.metadata.message_type != MessageType.TRAIN:
            return algorithm.travels(known)
        beside = algorithm.beside(known)
        if beside and self._private(only_config(message.content)[1]):
            raise WireError(f"a privacy mod would count what {algorithm.name} sends beside the adapter as adapter")
        return {**algorithm.travels(known), **beside}

    def _private(self, config: ConfigRecord) -> bool:
        """Whether one of Flower's privacy mods is around tuning."""
        return self.local_noise or names.CLIPPING_NORM in config

    def _data(self, task: _Task, context: Context) -> _Examples:
        """Examples to tune on and examples to watch, the same division in every round."""
        if task.public is not None and task.public.size:
            question = PublicQuestion.of(task.public, task.owner.bundle, task.tune)
            admit(question, self._kept(context), self._lasting_name(context))

        def examples(source: Source) -> Dataset:
            found = task.owner.examples(source, task.tune.block_size, task.tune.loss_on)
            if task.public is not None and overlap(found, task.public):
                raise PublicOverlap(
                    "some of this site's examples are in the public text that the server aligns the emulator on; "
                    "the two must have none in common"
                )
            return found

        loaded = self.load_data(context)
        if isinstance(loaded, tuple):
            return examples(loaded[0]), examples(loaded[1])
        # Not with the round's seed: what was validation data in round 1 would be tuned on in round 2.
        run_seed = int(task.config.get(names.TUNE + "seed", 0))  # type: ignore[arg-type]
        return split_examples(
            examples(loaded), task.tune.validation_share, client_seed(run_seed, 0, self.name(context))
        )


def _reference(owner: DataOwner, run: TuneConfig, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """What travelling values are differences from: the bundle's adapter, or zeros for LoRA factors and its head.

    No factor is made before the message's ``arrays`` were held to the shapes that its rank asks for.
    """
    shapes: dict[str, tuple[int, int]] = {}
    if run.lora is not None:
        shapes = expected_factors(adapter_blocks(owner.model, owner.plan), run.lora)
        check_backed(arrays, shapes)
    handed_out = {n: t.float() for n, t in owner.bundle.tensors().items() if n.startswith("adapter.")}
    if run.kept_lora is None:
        return handed_out
    factors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return factors | {name: value for name, value in handed_out.items() if is_head(name)}


class _Networks:
    """The network that this process has open: one, for frozen weights are large, shared by all virtual clients."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._open: dict[tuple[str, str, str | None], DataOwner] = {}

    def open(self, cache: Cache, digest: str, tune: TuneConfig) -> DataOwner:
        """The data owner of a bundle in ``cache``; ``BundleMissing`` if it isn't there.

        A digest is the same bundle in every cache, so virtual clients with caches of their own share it too.
        """
        key = (digest, tune.frozen_dtype, tune.device)
        if key not in self._open:
            bundle = cache.find(digest)
            if bundle is None:
                raise BundleMissing(f"bundle {digest[:12]} isn't in this site's cache")
            self._open.clear()
            self._open[key] = DataOwner.open(bundle, tune.frozen_dtype, tune.device)
        return self._open[key]

    def clear(self) -> None:
        """Forget it, as a new process would."""
        self._open.clear()


_networks = _Networks()
