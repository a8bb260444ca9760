"""FedBiOT: the server keeps the emulator aligned, the data owners keep their adapters near the one they got."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from offsite_fl.alignment import Aligner, AlignmentOptions, Stepped
from offsite_fl.bundle import Bundle
from offsite_fl.config import TuneConfig, check, from_mapping
from offsite_fl.data.fingerprints import Fingerprints
from offsite_fl.data.sources import Source
from offsite_fl.patch import Patch
from offsite_fl.wire import names

from .journal import log
from .preset import Preset, Setup

if TYPE_CHECKING:
    from offsite_fl.owner import ModelOwner

PROXIMAL = names.TUNE + "proximal-mu"


class FedBiOT(Preset):
    """Align the emulator on public text before each broadcast; clients are held near the adapter that they received.

    FedBiOT, arXiv 2406.17706. Clients minimise ``CE + epsilon * ||A - A_t||^2`` over whole weights (with LoRA: over the
    merged ``s B A``, :class:`~offsite_fl.tuning.proximal.Proximal`), the server aligns the emulator with the aggregated
    adapter A_t by ``NMSE + lambda_kl * KL`` (:class:`~offsite_fl.alignment.Aligner`), and averages as FedAvg does. The
    emulator's factors travel as a patch. Works inside :class:`OffsiteTuning`, which must be given ``public`` text.

    Args:
        epsilon: weight of the clients' proximal term, without a factor 1/2.
        lambda_kl: weight of the KL divergence in the alignment; 0 computes no outputs.
        kl_temperature: what its logits are divided by; the divergence is multiplied by the square of it.
        hidden: error of the hidden state that is aligned: "normalised", "cosine" or "layerwise"
            (:class:`~offsite_fl.alignment.AlignmentOptions`).
        first_steps: alignment steps before round 1.
        align_steps: alignment steps before a later broadcast.
        realign: every how many rounds that is done; 0: only before round 1; -1: never, and no patch travels.
        placement: "last" (the adapter must be the last blocks, as with ``split = "0-2"``) or "any".
        align_lr: learning rate of the alignment's own optimiser.
        align_optimizer: "adamw" or "sgd".
        align_batch: public examples of a step.
        align_rank: rank of the factors on the emulator's linears.
        align_alpha: their alpha; ``alpha / rank * B A`` is added.
        align_targets: the linears that get factors, ``q_proj/v_proj``; empty means all.
        options: FedAvg's.

    ``lambda_kl`` is the default of the published code. Its ``epsilon`` of 0.1 or 1 isn't: there the term has no
    gradient, and with one it all but stops the adapter (docs/strategies.md).
    """

    of_mean = True
    NOT_STATE = ("_public",)

    def __init__(
        self,
        *,
        epsilon: float = 0.001,
        lambda_kl: float = 0.9,
        first_steps: int = 500,
        align_steps: int = 10,
        realign: int = 1,
        placement: str = "last",
        align_lr: float = 1e-3,
        align_optimizer: str = "adamw",
        align_batch: int = 4,
        align_rank: int = 8,
        align_alpha: float = 16.0,
        align_targets: str = "",
        kl_temperature: float = 1.0,
        hidden: str = "normalised",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check(epsilon >= 0, f"fedbiot: epsilon can't be negative, got {epsilon}")
        check(first_steps >= 0 and align_steps >= 1, "fedbiot: first-steps must be at least 0, align-steps at least 1")
        check(realign >= -1, f"fedbiot: realign is a number of rounds, 0 for once or -1 for never, got {realign}")
        check(placement in ("last", "any"), f"fedbiot: placement must be last or any, got {placement!r}")
        self.epsilon, self.lambda_kl = epsilon, lambda_kl
        self.first_steps, self.align_steps, self.realign, self.placement = first_steps, align_steps, realign, placement
        self.align_lr, self.align_optimizer, self.align_batch = align_lr, align_optimizer, align_batch
        self.align_rank, self.align_alpha, self.align_targets = align_rank, align_alpha, align_targets
        self.kl_temperature, self.hidden = kl_temperature, hidden
        self._alignment(128, 0)  # a wrong option fails here, not in round 1
        self.public_digest = ""
        self.aligner: Aligner | None = None
        self._public: Fingerprints | None = None
        self._stepped: Stepped | None = None

    def _alignment(self, block_size: int, seed: int) -> AlignmentOptions:
        given = {
            "lambda-kl": self.lambda_kl,
            "kl-temperature": self.kl_temperature,
            "hidden": self.hidden,
            "rank": self.align_rank,
            "alpha": self.align_alpha,
            "targets": tuple(filter(None, self.align_targets.split("/"))),
            "lr": self.align_lr,
            "optimizer": self.align_optimizer,
            "batch-size": self.align_batch,
            "block-size": block_size,
            "seed": seed,
        }
        return from_mapping(AlignmentOptions, given)

    def fits(self, setup: Setup) -> None:
        """See :class:`Preset`."""
        adapter, depth, mu = setup.adapter, setup.depth, setup.tune.proximal_mu
        check(
            self.placement == "any" or adapter == tuple(range(depth - len(adapter), depth)),
            f"fedbiot tunes the last blocks, but the split is {setup.split}: set it to 0-2, or take "
            "fedbiot:placement=any",
        )
        check(mu == 0, f"fedbiot sets the proximal term by its epsilon: leave out tune.proximal-mu = {mu:g}")
        check(
            setup.public or self.realign < 0,
            "fedbiot aligns the emulator on public text: give it as public, or take fedbiot:realign=-1",
        )

    def meet(self, owner: ModelOwner, bundle: Bundle, tune: TuneConfig, public: Source | None) -> None:
        """See :class:`Preset`; opens the emulator and the public text."""
        if self.realign < 0 or public is None:
            return
        self.aligner = Aligner(owner, public, self._alignment(tune.block_size, tune.seed), bundle)
        self._public = self.aligner.public()
        self.public_digest = hashlib.sha256(self._public.tobytes()).hexdigest()

    # What the server does before a broadcast --------------------------------------------------------------------

    def steps_before(self, server_round: int) -> int:
        """Alignment steps before the broadcast of a round."""
        if self.realign < 0:
            return 0
        if server_round == 1:
            return self.first_steps
        return self.align_steps if self.realign > 0 and (server_round - 1) % self.realign == 0 else 0

    def align(self, server_round: int, adapter: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Align the emulator with the adapter's full values as they will be broadcast in ``server_round``."""
        steps, self._stepped = self.steps_before(server_round), None
        if self.aligner is None or steps == 0:
            return
        log.info("\t├──> Aligning the emulator: %d steps on %d public examples", steps, len(self.aligner.examples))
        self._stepped = self.aligner.align(adapter(), steps)
        log.info("\t│\t└── Loss: %.4f in the first step, %.4f in the last", self._stepped.first, self._stepped.last)

    def check_aggregate(self, adapter: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """``OffsiteError`` if the emulator gives no finite loss with an aggregated adapter (its full values)."""
        if self.aligner is not None:
            self.aligner.check(adapter())

    @property
    def patch(self) -> Patch | None:
        """The emulator's factors; None as long as none was trained."""
        return self.aligner.patch if self.aligner is not None and self.aligner.step else None

    @property
    def public(self) -> Fingerprints:
        """Fingerprints of the public examples."""
        return np.empty(0, np.uint64) if self._public is None else self._public

    # Flower's methods -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages with the proximal term: ``epsilon ||.||^2 = mu / 2 ||.||^2`` with ``mu = 2 epsilon``."""
        config[PROXIMAL] = 2 * self.epsilon
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's average; the metrics say what the alignment's loss was in its first and last step."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        if metrics is not None and self._stepped is not None:
            metrics["alignment_first_loss"] = self._stepped.first
            metrics["alignment_last_loss"] = self._stepped.last
        return arrays, metrics
