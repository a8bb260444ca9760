"""The data owner as a Flower ClientApp: receives a bundle once, tunes the adapter each round, sends back the update.

Works in simulation and deployment. In a deployment every message starts a new process, so the bundle lives in a disk
cache and is memory-mapped; in simulation one opened network is shared by all virtual clients of a worker process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.clientapp.typing import ClientAppCallable, Mod

from offsite_fl.bundle import Cache
from offsite_fl.data.examples import split_examples
from offsite_fl.data.fingerprints import overlap
from offsite_fl.data.sources import Source
from offsite_fl.errors import DataError, WireError
from offsite_fl.local.algorithm import LocalAlgorithm, Outcome
from offsite_fl.local.answering import BundleMissing, NoValidation, PublicOverlap, answering
from offsite_fl.local.open_network import networks
from offsite_fl.local.patch_store import PatchStore
from offsite_fl.local.public_question import PublicQuestion, admit
from offsite_fl.local.site import NameSite, Site, client_name
from offsite_fl.local.task import Task
from offsite_fl.local.turn import Turn, loss_of
from offsite_fl.wire import names
from offsite_fl.wire.codecs import encode
from offsite_fl.wire.packs import read_pack
from offsite_fl.wire.patches import read_patch
from offsite_fl.wire.records import only_config, text
from offsite_fl.wire.replies import beginning, for_reply, references
from offsite_fl.wire.settings import client_seed

Data = Source | tuple[Source, Source]
LoadData = Callable[[Context], Data]
_Examples = tuple[Dataset, Dataset | None]  # to tune on, and to watch


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
    handlers = _Handlers(load_data or load_from_node_config, name or client_name, cache, local_noise)
    guarded = functools.partial(answering, folders=lambda context: handlers.site(context).folders)

    def guard(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        return guarded(call_next)(message, context)  # for what the other mods raise

    app = ClientApp(mods=[guard, *mods])
    app.query(names.BUNDLE_ACTION)(guarded(handlers.query_bundle))
    app.train(names.BUNDLE_ACTION)(guarded(handlers.store_bundle))
    app.train(names.PATCH_ACTION)(guarded(handlers.store_patch))
    app.train(mods=list(train_mods))(guarded(handlers.tune))
    app.evaluate()(guarded(handlers.evaluate))
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


class _Handlers:
    """The handlers of one ClientApp."""

    def __init__(
        self, load_data: LoadData, name: NameSite, cache: Cache | str | Path | None, local_noise: bool
    ) -> None:
        self.load_data, self.given_name, self.given_cache, self.local_noise = load_data, name, cache, local_noise

    def site(self, context: Context) -> Site:
        """The site whose context this is."""
        return Site(context, self.given_name, self.given_cache)

    # The bundle ------------------------------------------------------------------------------------------------

    def query_bundle(self, message: Message, context: Context) -> Message:
        """Say whether the bundle is here, and if not, which files are still to come."""
        digest = text(only_config(message.content)[1].get(names.DIGEST), names.DIGEST)
        return _state(message, self.site(context), digest)

    def store_bundle(self, message: Message, context: Context) -> Message:
        """Keep the files of one message; the last one completes the bundle."""
        digest, files = read_pack(message.content)
        site = self.site(context)
        if site.cache.find(digest) is None:
            incoming = site.cache.receiver(digest, site.name)
            for name, data in files:
                incoming.store(name, data)
            if not incoming.missing():
                incoming.commit()
        return _state(message, site, digest)

    def store_patch(self, message: Message, context: Context) -> Message:
        """Keep factors for the emulator of a bundle that is here, and say which ones are on the disk now."""
        found, site = read_patch(message.content), self.site(context)
        if site.cache.find(found.patch.bundle) is None:
            raise BundleMissing(f"bundle {found.patch.bundle[:12]}, which a patch is for, isn't in the cache")
        if found.patch.digest != found.digest:
            raise WireError(f"the patch was damaged on its way: its digest is {found.patch.digest[:12]}")
        held = PatchStore(site.kept, found.patch.bundle, site.name).keep(found.patch, found.public)
        state: dict[str, Any] = {names.DIGEST: found.patch.bundle, names.PATCH: held, names.CLIENT: site.name}
        return Message(RecordDict({names.CONFIG: ConfigRecord(state)}), reply_to=message)

    # Tuning and evaluation -------------------------------------------------------------------------------------

    def tune(self, message: Message, context: Context) -> Message:
        """Tune the received adapter on this site's data and send it back in the same form."""
        site = self.site(context)
        with networks.lock:
            task = Task.read(message, site, local_noise=self.local_noise)
            data = self._data(task, site)
            done = _tuned(task, data, site)
            said = task.notes(site.name)
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

    def evaluate(self, message: Message, context: Context) -> Message:
        """Loss of the emulator with the received adapter on this site's validation data."""
        site = self.site(context)
        with networks.lock:
            task = Task.read(message, site, local_noise=self.local_noise)
            data = self._data(task, site)
            validation = data[1]
            if validation is None:
                raise NoValidation("this site has no validation data: set tune.validation-share or validation-data")
            if task.algorithm is not None:
                measured = task.algorithm.evaluate(_turn(task.algorithm, task, data, site))
            else:
                measured = {names.LOSS: loss_of(task.owner, task.start, validation, task.tune, task.run)}
            config = ConfigRecord(task.notes(site.name))
        metrics = MetricRecord({**measured, names.NUM_EXAMPLES: len(validation)})
        return Message(RecordDict({names.METRICS: metrics, names.CONFIG: config}), reply_to=message)

    def _data(self, task: Task, site: Site) -> _Examples:
        """Examples to tune on and examples to watch, the same division in every round."""
        if task.public is not None and task.public.size:
            question = PublicQuestion.of(task.public, task.owner.bundle, task.tune)
            admit(question, site.kept, site.lasting_name)

        def examples(source: Source) -> Dataset:
            found = task.owner.examples(source, task.tune.block_size, task.tune.loss_on)
            if task.public is not None and overlap(found, task.public):
                raise PublicOverlap(
                    "some of this site's examples are in the public text that the server aligns the emulator on; "
                    "the two must have none in common"
                )
            return found

        loaded = self.load_data(site.context)
        if isinstance(loaded, tuple):
            return examples(loaded[0]), examples(loaded[1])
        # Not with the round's seed: what was validation data in round 1 would be tuned on in round 2.
        run_seed = int(task.config.get(names.TUNE + "seed", 0))  # type: ignore[arg-type]
        return split_examples(examples(loaded), task.tune.validation_share, client_seed(run_seed, 0, site.name))


def _state(message: Message, site: Site, digest: str) -> Message:
    held = site.cache.find(digest) is not None
    state: dict[str, Any] = {names.DIGEST: digest, names.CLIENT: site.name, names.HELD: held}
    if not held:
        state[names.MISSING] = site.cache.receiver(digest, site.name).missing()
    return Message(RecordDict({names.CONFIG: ConfigRecord(state)}), reply_to=message)


def _tuned(task: Task, data: _Examples, site: Site) -> Outcome:
    if task.algorithm is not None:
        return _turn(task.algorithm, task, data, site).take()
    start = beginning(task.start, task.tune, task.run)
    update = task.owner.tune(data[0], task.tune, validation=data[1], start=start, merge=False)
    tensors = for_reply(update.tensors, task.start, task.run, whole=task.private)
    return Outcome(tensors, update.num_examples, update.metrics)


def _turn(algorithm: LocalAlgorithm, task: Task, data: _Examples, site: Site) -> Turn:
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
        cache=site.kept,
        site=site.name,
    )
