"""Federated offsite-tuning around any Flower strategy.

The wrapped strategy chooses nodes and aggregates; this one hands out the bundle, encodes, screens, and takes care
that no reply ends the run. It goes outside of Flower's privacy wrappers: ``OffsiteTuning(DP...(FedAvg()), ...)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    Result,
    Strategy,
)

from offsite_fl.bundle import Bundle
from offsite_fl.config import LoraOptions, TuneConfig, check, kebab, to_mapping
from offsite_fl.data.sources import Source
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.ledger import Kind, Ledger
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.patch import Patch
from offsite_fl.tuning.lora import unmoved
from offsite_fl.update import Update
from offsite_fl.wire import names
from offsite_fl.wire.codecs import CODECS, encode

from . import loop
from .arrivals import Waiting
from .central import EvaluateFn
from .delivery import Delivery
from .exchange import Answer, NoAnswer, config_of
from .journal import Journal, log
from .local_strategy import forms
from .lora_strategy import fresh_factors, settled
from .outgoing import Form, Outgoing, prepare
from .patching import Patching
from .preset import introduce
from .robust import Bounds, compare
from .screening import (
    Expected,
    Screened,
    check_aggregate,
    good_metrics,
    screen_evaluate,
    screen_train,
)
from .snapshot import nested, rollback_point, settings
from .streaming import StreamingMean, check_of_mean, step
from .work import Work

if TYPE_CHECKING:
    from offsite_fl.owner import ModelOwner

CLIENT_SIDE_DP = (DifferentialPrivacyClientSideFixedClipping, DifferentialPrivacyClientSideAdaptiveClipping)

EVALUATION = "evaluation: "  # begins the reason for a reply that was left out there


class OffsiteTuning(Strategy):
    """Hand out the bundle once, then federate its adapter with ``base``.

    Parameters
    ----------
    base
        Any Flower strategy: FedAvg, FedAdam, Krum, a privacy wrapper around one...
    owner
        The model owner; gives the values to begin with.
    bundle
        What the data owners get; None takes the owner's last one.
    codec
        Dtype on the wire: "fp32", "fp16", "bf16" or "int8". Aggregation is in fp32 whatever it is.
    tune
        How data owners tune; ``lora_rank`` above 0 lets only LoRA factors travel. A site may override what is its own
        business (``tune.batch-size``, ``tune.device``, a smaller ``tune.lora-rank``) in its node config. Entries
        ``tune.*`` of the ``train_config`` given to :meth:`start` win over this.
    min_results
        Good replies that a round needs; with fewer the adapter stays as it was and the round is marked as skipped.
    max_update_norm
        Replies farther from the sent adapter than this (L2 norm over all tensors) are dropped. None: no bound.
    clip_update_norm
        The update of replies farther than this is scaled down to it; the round's record counts them. None: no bound.
    max_norm_ratio
        Replies whose update's norm is more than this times the median norm of the round are dropped; above 1.
    min_cosine
        Replies whose update has a smaller cosine than this with the coordinate-wise median of the others' are dropped,
        and those without any change; from -1 to 1. Needs four good replies, ``max_norm_ratio`` three.
    streaming
        Fold each reply into the weighted mean as it comes, so that memory doesn't grow with the number of data owners.
        Only for a ``base`` that needs no more than the mean; ``ConfigError`` names those. Not with ``max_norm_ratio``
        or ``min_cosine``, which hold the replies of a round against each other.
    round_deadline
        Seconds that a round waits for the replies to its tuning, and again for those to its evaluation, in place of the
        ``timeout`` of :meth:`start`. Who answers later is left out. None: ``timeout``.
    quorum
        The round goes on, without the rest, as soon as this many good replies are in. None: all are waited for.
    public
        Text of nobody's private data, a file or ``datasets.Dataset``, for a ``base`` that aligns the emulator on it:
        :class:`~offsite_fl.strategies.FedBiOT`.
    run_dir
        Where checkpoints go, ``<run_dir>/checkpoints/round-NNN``. None: no checkpoints.
    resume
        Go on after the last checkpoint in ``run_dir``; ``CheckpointError`` if it was made with other settings.
    keep_checkpoints
        How many of the latest to keep; None keeps all.
    delivery_timeout
        Seconds to wait for each message of the bundle's delivery.
    progress
        Log the messages of a delivery.
    on_round
        Is told of each round's record when all of the round is done, round 0 included, as a tracker wants it.
    """

    def __init__(
        self,
        base: Strategy,
        owner: ModelOwner,
        bundle: Bundle | None = None,
        *,
        codec: str = "fp32",
        tune: TuneConfig | None = None,
        min_results: int = 1,
        max_update_norm: float | None = None,
        clip_update_norm: float | None = None,
        max_norm_ratio: float | None = None,
        min_cosine: float | None = None,
        streaming: bool = False,
        round_deadline: float | None = None,
        quorum: int | None = None,
        public: Source | None = None,
        run_dir: str | Path | None = None,
        resume: bool = False,
        keep_checkpoints: int | None = 3,
        delivery_timeout: float = 3600.0,
        progress: bool = True,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        check(min_results >= 1, f"min-results must be at least 1, got {min_results}")
        check(keep_checkpoints is None or keep_checkpoints >= 1, "keep-checkpoints must be at least 1")
        check(run_dir is not None or not resume, "resume needs a run folder: give run-dir")
        found = bundle or owner.bundle
        if found is None:
            raise ConfigError("there is no bundle to hand out: call owner.make_bundle() first, or pass one")
        _ = CODECS[codec]  # an unknown name fails here, with the near ones
        self.tune = settled(tune or TuneConfig(), base)
        if any(isinstance(strategy, CLIENT_SIDE_DP) for strategy in nested(base)):
            check(codec == "fp32", f"codec {codec!r} hides the values from the clipping on the clients: take fp32")
            check(not self.tune.lora_fresh, "clipping on the clients can't compare fresh LoRA factors with the adapter")
        self.base, self.owner, self.bundle = base, owner, found
        introduce(base, owner, found, self.tune, public)
        self.min_results = min_results
        self.bounds = Bounds(max_update_norm, clip_update_norm, max_norm_ratio, min_cosine)
        self.waiting = Waiting(streaming, round_deadline, quorum)
        self.work = Work.of(base)
        check(quorum is None or quorum >= min_results, f"a quorum of {quorum} is less than min-results {min_results}")
        if streaming:
            check_of_mean(base)
            compared = " and ".join(map(kebab, self.bounds.by_comparison))
            check(not compared, f"{compared} can't go with streaming: it needs all replies of a round at once")
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.resume, self.keep_checkpoints = resume, keep_checkpoints
        self.on_round = on_round
        self.journal = Journal()
        self.delivery = Delivery(found, self.journal, delivery_timeout, progress=progress)
        self.patching = Patching.of(base, self.journal, delivery_timeout, self.delivery.forget)
        self.state = owner.initial_state(self.lora, self.tune.seed)
        self.form = Form(found.digest, codec, self._reference(), self.tune, fresh_factors(owner, self.tune))
        self.train_form, self.evaluate_form = forms(base, self.form)
        keys = (getattr(strategy, "weighted_by_key", None) for strategy in nested(base))
        self.weight_key = next((key for key in keys if key is not None), names.NUM_EXAMPLES)
        self.settings = self._settings()
        self._train, self._evaluate = Outgoing(), Outgoing()
        self._without_validation: set[int] = set()

    # What it starts from and what comes out --------------------------------------------------------------------

    @property
    def history(self) -> list[RoundRecord]:
        """What happened, round by round; round 0 is the state before any tuning."""
        return self.journal.rounds

    @property
    def ledger(self) -> Ledger:
        """Bytes that went each way, by round, kind and node."""
        return self.journal.ledger

    @property
    def lora(self) -> LoraOptions | None:
        """The LoRA options of the run's state and of :meth:`update`; None where that is a full adapter."""
        return self.tune.kept_lora

    @property
    def patch(self) -> Patch | None:
        """The factors that are on the data owners' emulators beside the bundle's values; None where there are none."""
        return self.patching.patch

    def initial_arrays(self) -> ArrayRecord:
        """The adapter (or LoRA factors) to begin with, as Flower's ``start`` wants it."""
        return encode(self.state, self.state)[0]

    def update(self) -> Update:
        """The aggregated result so far, ready for ``owner.plug_in``."""
        clients = self.history[-1].clients.values() if self.history else ()
        examples = sum(metrics.get(self.weight_key, 0) for metrics in clients)
        return Update(dict(self.state), self.bundle.digest, int(examples), self.lora)

    def tensors_of(self, arrays: ArrayRecord) -> dict[str, torch.Tensor]:
        """fp32 tensors of an array record that has exactly the adapter's names and shapes."""
        return self.form.plain(arrays)

    def _reference(self) -> dict[str, torch.Tensor]:
        """What the codec measures differences from: the bundle's adapter, or zeros for LoRA factors and its head."""
        if self.lora is not None:
            return unmoved(self.state)
        handed_out = self.bundle.tensors()
        wanted = {name for name in handed_out if name.startswith("adapter.")}
        if wanted != self.state.keys():
            raise ConfigError(f"the owner's adapter isn't the bundle's: {sorted(wanted ^ self.state.keys())[:3]}")
        return {name: handed_out[name].float() for name in self.state}

    def _settings(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        tune = to_mapping(self.tune, names.TUNE)
        for free in ("progress", "device"):
            del tune[names.TUNE + free]
        return {
            "digest": self.bundle.digest,
            "codec": self.form.codec,
            "min-results": self.min_results,
            **{kebab(name): bound for name, bound in asdict(self.bounds).items()},
            **{kebab(name): value for name, value in asdict(self.waiting).items()},
            **tune,
            **{f"base.{key}": value for key, value in settings(self.base).items()},
        }

    # Flower's four methods -------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """``base``'s messages, for the nodes that have the bundle, with encoded arrays and the tuning settings."""
        self.journal.begin(server_round)
        self.patching.renew(server_round, lambda: self.owner.adapter_values(self.state, self.lora))
        messages = list(self.base.configure_train(server_round, arrays, config, grid))
        self._train = self._prepare(messages, self.train_form, server_round, grid)
        return self._train.posted()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen, aggregate in fp32 with ``base``, check the result. ``(None, None)`` leaves the adapter as it was."""
        mean = StreamingMean() if self.waiting.streaming else None
        answers = self._receive(self._train, replies, server_round, "update")
        screened = self._in_order(self._screen(answers, mean), self._train, server_round)
        self.journal.clipped(server_round, sum(map(self.bounds.clips, screened.good_norms)))
        clients = self.journal.record(server_round).clients
        clients |= {self.journal.nodes[node]: metrics for node, metrics in good_metrics(screened.good).items()}
        if len(screened.good) < self.min_results:
            self.journal.skip(server_round, f"{len(screened.good)} good replies, {self.min_results} are needed")
            return None, None
        undo = rollback_point(self.base)
        try:
            messages = [message for _, message in screened.good]
            if mean is None:
                aggregate, metrics = self.base.aggregate_train(server_round, messages)
            else:
                aggregate, metrics = step(self.base, server_round, mean, messages, self.weight_key)
            arrays = self._train.with_kept(check_aggregate(aggregate, self.form.reference))
            self.patching.check_aggregate(lambda: self.owner.adapter_values(self.tensors_of(arrays), self.lora))
            return arrays, metrics
        except Exception as error:  # Flower's strategies raise many kinds; none of them may end the run
            undo()
            self.journal.skip(server_round, f"{type(self.base).__name__} couldn't aggregate: {error}")
            return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """``base``'s messages with encoded arrays, for the nodes that have the bundle and data to evaluate on."""
        found = self.base.configure_evaluate(server_round, arrays, config, grid)
        messages = [m for m in found if m.metadata.dst_node_id not in self._without_validation]
        self._evaluate = self._prepare(messages, self.evaluate_form, server_round, grid)
        return self._evaluate.posted()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Screen the metrics and average them with ``base``; None if there are none."""
        answers = self._receive(self._evaluate, replies, server_round, "metrics", EVALUATION)
        screened = screen_evaluate(answers, self.weight_key, self.waiting.quorum)
        screened = self._in_order(screened, self._evaluate, server_round, EVALUATION)
        clients = self.journal.record(server_round).clients
        for node, metrics in good_metrics(screened.good).items():
            client = clients.setdefault(self.journal.nodes[node], {})
            client |= {f"evaluate_{name}": value for name, value in metrics.items()}
        if not screened.good:
            return None
        try:
            return self.base.aggregate_evaluate(server_round, [message for _, message in screened.good])
        except Exception as error:  # as in aggregate_train
            log.warning("round %d: evaluation metrics couldn't be averaged: %s", server_round, error)
            return None

    def summary(self) -> None:
        """Log the settings, and those of the wrapped strategy."""
        log.info("\t├──> Offsite-tuning settings:")
        log.info("\t│\t├── Bundle: %s (%.1f MB)", self.bundle.digest[:12], self.bundle.total_bytes / 1e6)
        log.info("\t│\t├── Trains: %s", "LoRA factors in the adapter" if self.tune.lora else "the whole adapter")
        log.info("\t│\t└── Wire codec: %s | minimum good replies: %d", self.form.codec, self.min_results)
        self.base.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run all rounds: Flower's ``start``, with checkpoints, resume and no end by a bad reply.

        ``initial_arrays`` None begins with the owner's adapter. ``num_rounds`` counts from round 1, also on resume.
        :meth:`update` gives the result afterwards, ``history`` and ``ledger`` what happened.
        """
        plan = loop.Plan(num_rounds, timeout, train_config, evaluate_config, evaluate_fn)
        if initial_arrays is not None:
            self.state = self.tensors_of(initial_arrays)
        result: Result = loop.run(self, grid, plan)
        return result

    # The steps they share --------------------------------------------------------------------------------------

    def _prepare(self, messages: list[Message], form: Form, server_round: int, grid: Grid) -> Outgoing:
        """Deliver bundle and patch where they are missing, then encode the messages for the nodes that have them."""
        nodes = [m.metadata.dst_node_id for m in messages]
        failed = self.delivery.ensure(grid, server_round, nodes)
        failed |= self.patching.ensure(grid, server_round, [node for node in nodes if node not in failed])
        if form.algorithm is not None:
            failed |= self.journal.namesakes([n for n in nodes if n not in failed], set(grid.get_node_ids()))
        for node, reason in failed.items():
            self.journal.drop(server_round, node, reason)
        outgoing: Outgoing = prepare(messages, form, server_round, without=failed)
        for message in outgoing.messages:
            self.patching.sign(message.content.config_records[names.CONFIG])
            if form.algorithm is not None:
                last = self.journal.last_used(message.metadata.dst_node_id, self.weight_key)
                message.content.config_records[names.CONFIG][names.STATE_ROUND] = last
            self.journal.count(server_round, "adapter", "down", message.metadata.dst_node_id, message.content)
        return outgoing

    def _receive(
        self, outgoing: Outgoing, replies: Iterable[Message], server_round: int, kind: Kind, what: str = ""
    ) -> Iterator[Answer]:
        """The answers as they come, each booked. Who gave none is noted, the silent ones when the time is over."""
        for found in outgoing.mailing.opened(replies):
            if isinstance(found, Answer):
                self._book(found, server_round, kind)
                found = self.patching.checked(found)
            if isinstance(found, Answer):
                yield found
            else:
                self._note(found, server_round, what)
            del found  # or the reply would stay in memory while the next one comes
        for silent in outgoing.mailing.missing(self.waiting.too_late):
            self._note(silent, server_round, what)

    def _book(self, answer: Answer, server_round: int, kind: Kind) -> None:
        self.journal.learn(answer.node, answer.message.content)
        self.journal.count(server_round, kind, "up", answer.node, answer.message.content)
        if config_of(answer.message.content).get(names.EVALUATES) is False:
            self._without_validation.add(answer.node)

    def _note(self, absent: NoAnswer, server_round: int, what: str) -> None:
        if absent.code == names.NO_VALIDATION:  # a choice of the site, no fault
            self._without_validation.add(absent.node)
            return
        if absent.code == names.BUNDLE_MISSING:
            self.delivery.forget(absent.node)
        if absent.code == names.PATCH_MISSING:
            self.patching.forget(absent.node)
        self.journal.drop(server_round, absent.node, what + absent.reason)

    def _screen(self, answers: Iterable[Answer], mean: StreamingMean | None) -> Screened:
        """Each reply by itself, then the good ones held against each other."""
        sent, bounds = self._train.sent, self.bounds
        expected = Expected(
            sent,
            self.train_form,
            self.weight_key,
            bounds.max_update_norm,
            train=self._train.train,
            clip_update_norm=bounds.clip_update_norm,
            beside=self._train.beside,
            work=self.work,
        )
        fold = None if mean is None else mean.add
        return compare(screen_train(answers, expected, fold, self.waiting.quorum), sent, bounds)

    def _in_order(self, screened: Screened, outgoing: Outgoing, server_round: int, what: str = "") -> Screened:
        """Report what was dropped, and put the rest into an order that is the same in every run."""
        for unheard in outgoing.mailing.missing(self.waiting.not_needed):
            self._note(unheard, server_round, what)
        for node, reason in screened.bad:
            self.journal.drop(server_round, node, what + reason)
        screened.good.sort(key=lambda item: (self.journal.nodes[item[0]], item[0]))
        return screened
