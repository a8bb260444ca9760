"""Federated offsite-tuning around any Flower strategy.

The wrapped strategy chooses nodes and aggregates; this one hands out the bundle, encodes, screens, and takes care
that no reply ends the run. It goes outside of Flower's privacy wrappers: ``OffsiteTuning(DP...(FedAvg()), ...)``.
"""

from __future__ import annotations

from collections.abc import Iterable
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
from offsite_fl.config import TuneConfig, check, to_mapping
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.ledger import Kind, Ledger
from offsite_fl.evaluation.rounds import RoundRecord
from offsite_fl.update import Update
from offsite_fl.wire import names
from offsite_fl.wire.codecs import CODECS, encode

from . import loop
from .central import EvaluateFn
from .delivery import Delivery
from .exchange import Answer, config_of
from .journal import Journal, log
from .outgoing import Form, Outgoing, prepare
from .screening import (
    Expected,
    Screened,
    check_aggregate,
    good_metrics,
    screen_evaluate,
    screen_train,
)
from .snapshot import nested, rollback_point, settings

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
        business (``tune.batch-size``, ``tune.device``...) in its node config. Entries ``tune.*`` of the
        ``train_config`` given to :meth:`start` win over this.
    min_results
        Good replies that a round needs; with fewer the adapter stays as it was and the round is marked as skipped.
    max_update_norm
        Replies farther from the sent adapter than this (L2 norm over all tensors) are dropped. None: no bound.
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
        run_dir: str | Path | None = None,
        resume: bool = False,
        keep_checkpoints: int | None = 3,
        delivery_timeout: float = 3600.0,
        progress: bool = True,
    ) -> None:
        check(min_results >= 1, f"min-results must be at least 1, got {min_results}")
        check(keep_checkpoints is None or keep_checkpoints >= 1, "keep-checkpoints must be at least 1")
        check(max_update_norm is None or max_update_norm > 0, "max-update-norm must be above 0")
        check(run_dir is not None or not resume, "resume needs a run folder: give run-dir")
        found = bundle or owner.bundle
        if found is None:
            raise ConfigError("there is no bundle to hand out: call owner.make_bundle() first, or pass one")
        _ = CODECS[codec]  # an unknown name fails here, with the near ones
        if codec != "fp32" and any(isinstance(strategy, CLIENT_SIDE_DP) for strategy in nested(base)):
            raise ConfigError(f"codec {codec!r} hides the values from the clipping on the clients: take fp32")
        self.base, self.owner, self.bundle = base, owner, found
        self.tune = tune or TuneConfig()
        self.min_results, self.max_update_norm = min_results, max_update_norm
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.resume, self.keep_checkpoints = resume, keep_checkpoints
        self.journal = Journal()
        self.delivery = Delivery(found, self.journal, delivery_timeout, progress=progress)
        self.state = owner.initial_state(self.tune.lora, self.tune.seed)
        self.form = Form(found.digest, codec, self._reference(), self.tune)
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

    def initial_arrays(self) -> ArrayRecord:
        """The adapter (or LoRA factors) to begin with, as Flower's ``start`` wants it."""
        return encode(self.state, self.state)[0]

    def update(self) -> Update:
        """The aggregated result so far, ready for ``owner.plug_in``."""
        clients = self.history[-1].clients.values() if self.history else ()
        examples = sum(metrics.get(self.weight_key, 0) for metrics in clients)
        return Update(dict(self.state), self.bundle.digest, int(examples), self.tune.lora)

    def tensors_of(self, arrays: ArrayRecord) -> dict[str, torch.Tensor]:
        """fp32 tensors of an array record that has exactly the adapter's names and shapes."""
        return self.form.plain(arrays)

    def _reference(self) -> dict[str, torch.Tensor]:
        """What the codec measures differences from: the bundle's own adapter, or zeros for LoRA factors."""
        if self.tune.lora is not None:
            return {name: torch.zeros_like(value) for name, value in self.state.items()}
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
            "max-update-norm": self.max_update_norm,
            **tune,
            **{f"base.{key}": value for key, value in settings(self.base).items()},
        }

    # Flower's four methods -------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """``base``'s messages, for the nodes that have the bundle, with encoded arrays and the tuning settings."""
        self.journal.begin(server_round)
        messages = list(self.base.configure_train(server_round, arrays, config, grid))
        self._train = self._prepare(messages, server_round, grid)
        return self._train.posted()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen, aggregate in fp32 with ``base``, check the result. ``(None, None)`` leaves the adapter as it was."""
        answers = self._receive(self._train, replies, server_round, "update")
        expected = Expected(self._train.sent, self.form, self.weight_key, self.max_update_norm)
        screened = self._in_order(screen_train(answers, expected), server_round)
        clients = self.journal.record(server_round).clients
        clients |= {self.journal.nodes[node]: metrics for node, metrics in good_metrics(screened.good).items()}
        if len(screened.good) < self.min_results:
            self.journal.skip(server_round, f"{len(screened.good)} good replies, {self.min_results} are needed")
            return None, None
        undo = rollback_point(self.base)
        try:
            aggregate, metrics = self.base.aggregate_train(server_round, [message for _, message in screened.good])
            return check_aggregate(aggregate, self.form.reference), metrics
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
        self._evaluate = self._prepare(messages, server_round, grid)
        return self._evaluate.posted()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Screen the metrics and average them with ``base``; None if there are none."""
        answers = self._receive(self._evaluate, replies, server_round, "metrics", EVALUATION)
        screened = self._in_order(screen_evaluate(answers, self.weight_key), server_round, EVALUATION)
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

    def _prepare(self, messages: list[Message], server_round: int, grid: Grid) -> Outgoing:
        """Deliver the bundle where it is missing, then encode the messages for the nodes that have it."""
        failed = self.delivery.ensure(grid, server_round, [m.metadata.dst_node_id for m in messages])
        for node, reason in failed.items():
            self.journal.drop(server_round, node, reason)
        outgoing: Outgoing = prepare(messages, self.form, server_round, without=failed)
        for message in outgoing.messages:
            self.journal.count(server_round, "adapter", "down", message.metadata.dst_node_id, message.content)
        return outgoing

    def _receive(
        self, outgoing: Outgoing, replies: Iterable[Message], server_round: int, kind: Kind, what: str = ""
    ) -> list[Answer]:
        answers, absent = outgoing.mailing.sort(replies)
        for answer in answers:
            self.journal.learn(answer.node, answer.message.content)
            self.journal.count(server_round, kind, "up", answer.node, answer.message.content)
            if config_of(answer.message.content).get(names.EVALUATES) is False:
                self._without_validation.add(answer.node)
        for no_answer in absent:
            if no_answer.code == names.NO_VALIDATION:  # a choice of the site, no fault
                self._without_validation.add(no_answer.node)
                continue
            if no_answer.code == names.BUNDLE_MISSING:
                self.delivery.forget(no_answer.node)
            self.journal.drop(server_round, no_answer.node, what + no_answer.reason)
        return answers

    def _in_order(self, screened: Screened, server_round: int, what: str = "") -> Screened:
        """Report what was dropped, and put the rest into an order that is the same in every run."""
        for node, reason in screened.bad:
            self.journal.drop(server_round, node, what + reason)
        screened.good.sort(key=lambda item: (self.journal.nodes[item[0]], item[0]))
        return screened
