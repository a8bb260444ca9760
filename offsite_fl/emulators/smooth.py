"""Smooth Model Compression (arXiv 2505.24469): weights that are made smooth lose less when they are cut to low rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from offsite_fl.config import check, check_choices
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, copy_structure, register
from offsite_fl.emulators.budget import BudgetedMethod, emulator_bytes
from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.input_moments import input_moments
from offsite_fl.emulators.parts import find_parts
from offsite_fl.emulators.penalties import Dim, Norm, Penalty
from offsite_fl.emulators.penalty_choice import Choice, PenaltyRules, choose_penalties
from offsite_fl.emulators.rank_rules import Place, cut_to, places, ranks_by_energy, ranks_by_size, spectrum
from offsite_fl.emulators.reorder import reorder_channels
from offsite_fl.emulators.smooth_prox import proximal
from offsite_fl.emulators.smooth_training import SmoothTraining, train_smooth
from offsite_fl.emulators.streams import sent_home, working_copy
from offsite_fl.emulators.training import refuse_packed
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import linear_weight

Chains = Mapping[int, tuple[ChannelChain, ...]]

# Factors of the penalties where none is given. In one shot every factor costs accuracy; a training needs a larger one.
LAM = {"prox": 1e-3, "train": 1e-2}


@register("smooth")
@dataclass(frozen=True)
class Smooth(BudgetedMethod):
    """Make the linears of the frozen blocks smooth, then cut each to two factors by SVD, with no tuning after that.

    Smooth Model Compression, arXiv 2505.24469: under a penalty R a weight W comes near to a matrix of low rank. R is
    the nuclear norm (``nuc``) or ``sum_i ||w_(i+1) - w_i||^2`` (``d1``) or ``sum_i ||w_(i+1) - 2 w_i + w_(i-1)||^2``
    (``d2``) over W's channels: its rows (``dim=out``), its columns (``in``), or both. ``norm=l1`` takes absolute values
    for squares. Every R is in units of W's root mean square, so that one factor ``lam`` does for all. ``mlp`` is the
    penalty of linears that write or read an MLP's inner channels, ``attention`` that of all others. ``mode``:

    * ``prox`` (ours; needs no text): ``argmin 1/2 ||W - W0||^2 + lam R(W)``, in closed form. Differences are taken only
      where the order of channels is free, after ``reorder`` has put an MLP's channels in an order in which neighbours
      are alike (greedy nearest neighbour), which leaves what the block computes as it is. Other linears of the MLP get
      the nuclear norm. Attention has no free order here: dims inside its heads (value with output, query with key in
      rotary pairs) could be reordered too, but aren't.
      ``weighted`` takes ``W C^1/2`` with C = E[x x'] of the full model's inputs, which needs text. By itself a plain
      truncation is nearest to W0, so a small ``lam`` is what this mode wants.
    * ``train`` (the paper's): ``w_lm * L_LM + w_kd * L_KD + lam(t) * sum R(W)`` over all linears, on calibration text
      as ``distill`` does it; lam(t) rises from 0 over the first 30 % of the steps. Nuclear norms are decomposed every
      10 steps. Differences are taken along any channels, in the order that they have. Every ``eval_every`` steps L_KD
      is measured on held out text with the linears cut, and the best is kept; plain truncation is the first candidate.
      Resumes from ``workdir``.

    ``rank=budget`` leaves every linear the same share of its numbers, ``rank=energy`` lets each lose the same share of
    its squared singular values; both meet the same budget. ``mlp=auto`` is nuc in mode train, and in mode prox what a
    block allows: d2 where channels are found whose order is free (of a gated MLP as of two linears around a GELU, in
    text and vision blocks alike), else nuc. ``lam``, where it isn't given, is 0.001 in mode prox and 0.01 in train.
    """

    mode: Literal["prox", "train"] = "prox"
    attention: Choice = "nuc"
    mlp: Literal["auto", "nuc", "d1", "d2", "none"] = "auto"
    lam: float | None = None
    dim: Literal["out", "in", "both"] = "out"
    norm: Norm = "l2sq"
    reorder: bool = True
    rank: Literal["budget", "energy"] = "budget"
    weighted: bool = False
    steps: int = 1000
    lr: float = 1e-4
    w_lm: float = 1.0
    w_kd: float = 30.0
    eval_every: int = 100

    grain: ClassVar[str] = "ranks are whole, and what isn't a dense linear stays as it is"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        check(self.lam is None or self.lam >= 0, f"smooth lam = {self.lam!r} can't be negative")
        for name in ("steps", "eval_every"):
            check(getattr(self, name) >= 1, f"smooth {name} must be at least 1, got {getattr(self, name)}")
        check(self.lr > 0, f"smooth lr must be above 0, got {self.lr}")
        for name in ("w_lm", "w_kd"):
            check(getattr(self, name) >= 0, f"smooth {name} can't be negative, got {getattr(self, name)}")
        check(self.w_lm + self.w_kd > 0, "smooth has nothing to train for: w-lm and w-kd are both 0")
        if self.mode == "train":
            check(not self.weighted, "smooth weighted=true weighs by the full model's inputs: it goes with mode=prox")
        else:
            check(self.norm == "l2sq", "smooth norm=l1 has no closed form: it goes with mode=train")
            check(
                self.attention in ("nuc", "none"),
                f"smooth attention={self.attention} can't be had in one shot: the channels of attention stand in a "
                "fixed order, in which neighbours have nothing in common; use attention=nuc, or mode=train",
            )

    @property
    def strength(self) -> float:
        """The factor of the penalties."""
        return LAM[self.mode] if self.lam is None else self.lam

    @property
    def rules(self) -> PenaltyRules:
        """Which penalty goes where."""
        mlp = self.mlp if self.mlp != "auto" else "d2" if self.mode == "prox" else "nuc"
        dims: tuple[Dim, ...] = ("out", "in") if self.dim == "both" else (self.dim,)
        return PenaltyRules(self.attention, mlp, dims, self.norm, anywhere=self.mode == "train")

    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Return new blocks; what isn't a linear is shared with ``emulator``'s blocks, unless they were trained."""
        assert budget is not None
        if budget >= emulator_bytes(emulator):
            blocks = [EmulatorBlock(copy_structure(block.module), block.origin) for block in emulator.blocks]
            return Emulator(blocks, dict(emulator.layout))
        if self.mode == "train":
            _check_trainable(emulator)
        chains = self._chains(emulator, context)
        emulator = self._reordered(emulator, context, chains)
        penalties = {
            (slot, path): penalty
            for slot, block in enumerate(emulator.blocks)
            for path, penalty in choose_penalties(block.module, chains.get(slot, ()), self.rules).items()
        }
        shape = self._trained if self.mode == "train" else self._moved
        built = shape(emulator, context, budget, penalties)
        return replace(built, notes=self._notes(emulator, chains))

    def _chains(self, emulator: Emulator, context: Context) -> Chains:
        """The channel chains of each block; not looked for where nothing depends on them."""
        if self.rules.mlp == self.rules.attention and not self.rules.differences:
            return {}
        found = find_parts(emulator, context)
        targets = {slot: [part.target for part in block.parts] for slot, block in found.items()}
        return {slot: tuple(t for t in of if isinstance(t, ChannelChain)) for slot, of in targets.items()}

    def _reordered(self, emulator: Emulator, context: Context, chains: Chains) -> Emulator:
        if not (self.reorder and self.rules.differences):
            return emulator
        blocks = []
        for slot, block in enumerate(context.track(emulator.blocks, "smooth: reorder", total=len(emulator.blocks))):
            module = working_copy(block.module, context.device)
            for chain in chains.get(slot, ()):
                reorder_channels(module, chain, self.rules.dims)
            blocks.append(EmulatorBlock(sent_home(module, context), block.origin))
        return Emulator(blocks, dict(emulator.layout))

    def _moved(self, emulator: Emulator, context: Context, budget: int, penalties: Mapping[Place, Penalty]) -> Emulator:
        """Every matrix that is to be cut moved by its penalty's proximal operator, and cut."""

        def moved(linear: nn.Module, place: Place, moments: Tensor | None) -> Tensor:
            return proximal(linear_weight(linear).detach(), penalties.get(place), self.strength, moments)

        if self.rank == "energy":
            spectra = {}
            for slot, moments in self._visits(emulator, context, "smooth: spectra"):
                block = working_copy(emulator.blocks[slot].module, context.device)
                for path, linear in dense_linears(block):
                    weight = moved(linear, (slot, path), moments.get(path))
                    spectra[slot, path] = spectrum(weight, moments.get(path))
            ranks = ranks_by_energy(emulator, budget, spectra)
        else:
            ranks = ranks_by_size(emulator, budget)
        modules = {}
        for slot, moments in self._visits(emulator, context, "smooth prox"):
            block = working_copy(emulator.blocks[slot].module, context.device)
            for path, linear in list(dense_linears(block)):
                if (slot, path) in ranks:
                    weight = moved(linear, (slot, path), moments.get(path))
                    cut_to(block, path, weight, ranks[slot, path], moments.get(path))
            modules[slot] = sent_home(block, context)
        blocks = [EmulatorBlock(modules[slot], block.origin) for slot, block in enumerate(emulator.blocks)]
        return Emulator(blocks, dict(emulator.layout))

    def _visits(self, emulator: Emulator, context: Context, what: str) -> Iterator[tuple[int, Mapping[str, Tensor]]]:
        """Every block of ``emulator`` by its index, with its inputs' moments where they are to count."""
        if self.weighted:
            yield from input_moments(emulator, context, context.need_calibration("smooth weighted=true"), what)
        else:
            for slot in context.track(range(len(emulator.blocks)), what):
                yield slot, {}

    def _trained(
        self, emulator: Emulator, context: Context, budget: int, penalties: Mapping[Place, Penalty]
    ) -> Emulator:
        """Trained under the penalties, and cut."""

        def ranks(weights: Mapping[Place, Tensor]) -> dict[Place, int]:
            if self.rank == "budget":
                return ranks_by_size(emulator, budget)
            return ranks_by_energy(emulator, budget, {place: spectrum(w) for place, w in weights.items()})

        options = SmoothTraining(
            self.steps,
            self.lr,
            self.w_lm,
            self.w_kd,
            eval_every=self.eval_every,
            select="distill",
            lam=self.strength,
            spec=str(self),
        )
        trained = train_smooth(emulator, context, options, penalties, ranks)
        weights = {place: linear_weight(linear).detach() for place, linear in places(trained).items()}
        for (slot, path), rank in ranks(weights).items():
            cut_to(trained.blocks[slot].module, path, weights[slot, path].double(), rank)
        return trained

    def _notes(self, emulator: Emulator, chains: Chains) -> tuple[str, ...]:
        bare = sum(any(dense_linears(b.module)) and not chains.get(slot) for slot, b in enumerate(emulator.blocks))
        if not self.rules.differences or not bare:
            return ()
        return (
            f"smooth found no MLP channels whose order is free in {bare} of {len(emulator.blocks)} blocks, so all "
            f"their linears were treated as attention ({self.attention})",
        )


def _check_trainable(emulator: Emulator) -> None:
    refuse_packed(emulator, Smooth.name)
    if not places(emulator):
        raise EmulatorError("smooth: no dense linear is left to cut; put smooth before what replaces linears")
