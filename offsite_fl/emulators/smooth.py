"""Smooth Model Compression (arXiv 2505.24469): weights that are made smooth lose less when they are cut to low rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from offsite_fl.config import check, check_choices
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, copy_structure, register
from offsite_fl.emulators.budget import BudgetedMethod, emulator_bytes
from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.free_order import FreeBySlot, find_free
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.input_moments import input_moments
from offsite_fl.emulators.penalties import Dim, Norm, Penalty
from offsite_fl.emulators.penalty_choice import Choice, PenaltyRules, choose_penalties, has_differences, kinds_of
from offsite_fl.emulators.rank_rules import Place, cut_to, places, ranks_by_energy, ranks_by_size, spectrum
from offsite_fl.emulators.reorder import Order, find_order, put_in_order, reorder
from offsite_fl.emulators.smooth_prox import proximal
from offsite_fl.emulators.smooth_training import SmoothTraining, train_smooth
from offsite_fl.emulators.streams import sent_home, working_copy
from offsite_fl.emulators.training import refuse_packed
from offsite_fl.emulators.value_dims import ValueDims
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import linear_weight

Penalties = Mapping[Place, Sequence[Penalty]]

# Factors of the penalties where none is given. In one shot every factor costs accuracy; a training needs a larger one.
LAM = {"prox": 1e-3, "train": 0.1}


@register("smooth")
@dataclass(frozen=True)
class Smooth(BudgetedMethod):
    """Make the linears of the frozen blocks smooth, then cut each to two factors by SVD, with no tuning after that.

    Smooth Model Compression, arXiv 2505.24469: under a penalty R a weight W comes near to a matrix of low rank. R is
    the nuclear norm (``nuc``) or ``sum_i ||w_(i+1) - w_i||^2`` (``d1``) or ``sum_i ||w_(i+1) - 2 w_i + w_(i-1)||^2``
    (``d2``) over W's channels: its rows (``dim=out``), its columns (``in``), or both. Several are added up: ``nuc/d1``,
    ``d1/d2``. ``norm=l1`` takes absolute values for squares. ``mlp`` is for linears that write or read an MLP's inner
    channels, ``attention`` for all others. ``mode``:

    * ``prox`` (ours; needs no text): ``argmin 1/2 ||W - W0||^2 + lam R(W)``, in closed form, which differences and the
      nuclear norm together don't have. Differences are taken only where the order of channels is free, after
      ``reorder`` has put them in an order in which neighbours are alike (greedy nearest neighbour), which leaves what
      the block computes as it is. That is an MLP's channels, and the dims of attention's values inside each head, with
      the inputs that read them (:mod:`offsite_fl.emulators.value_dims`; where heads aren't found, as in fused
      projections, they stay). Other linears get the nuclear norm: queries and keys among them, as each rotary pair of
      their dims is turned by an angle of its own. ``weighted`` takes ``W C^1/2`` with C = E[x x'] of the full model's
      inputs, which needs text. By itself a plain truncation is nearest to W0, so a small ``lam`` is what this mode
      wants. Blocks are reordered, moved and cut one by one.
    * ``train`` (the paper's): ``w_lm * L_LM + w_kd * L_KD + lam(t) * sum R(W)`` over all linears, on calibration text
      as ``distill`` does it; lam(t) rises from 0 over the first 30 % of the steps. Nuclear norms are decomposed every
      10 steps. Differences are taken along any channels, in the order that they have; what is free is reordered
      before. Every ``eval_every`` steps L_KD is measured on held out text with the linears cut, and the best is kept;
      plain truncation is the first candidate. Resumes from ``workdir``.

    ``rank=budget`` leaves every linear the same share of its numbers, ``rank=energy`` lets each lose the same share of
    its squared singular values; both meet the same budget. ``mlp=auto`` is nuc in mode train, and in mode prox what a
    block allows: d2 where channels are found whose order is free (of a gated MLP as of two linears around a GELU, in
    text and vision blocks alike), else nuc.

    ``lam``, where it isn't given, is 0.001 in mode prox and 0.1 in train. This and ``lr`` are ours, not the paper's:
    every R is in units of W's root mean square here, which the paper's isn't, so that one factor does for all matrices
    and penalties.
    """

    mode: Literal["prox", "train"] = "prox"
    attention: Choice = "nuc"
    mlp: Literal["auto", Choice] = "auto"
    lam: float | None = None
    dim: Literal["out", "in", "both"] = "out"
    norm: Norm = "l2sq"
    reorder: bool = True
    rank: Literal["budget", "energy"] = "budget"
    weighted: bool = False
    steps: int = 1000
    lr: float = 3e-4
    w_lm: float = 1.0
    w_kd: float = 30.0
    eval_every: int = 100

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
            for key, choice in (("attention", self.rules.attention), ("mlp", self.rules.mlp)):
                check(
                    not has_differences(choice) or "nuc" not in kinds_of(choice),
                    f"smooth {key}={choice} has no closed form: differences and the nuclear norm together go with "
                    "mode=train",
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
        free = self._free(emulator, context)
        penalties = {
            (slot, path): added
            for slot, block in enumerate(emulator.blocks)
            for path, added in choose_penalties(block.module, free.get(slot, ()), self.rules).items()
        }
        shape = self._trained if self.mode == "train" else self._moved
        built = shape(emulator, context, budget, penalties, free)
        return replace(built, notes=self._notes(emulator, free))

    def _why_missed(self) -> str:
        rounding = ", the same share of every linear rounded down" if self.rank == "budget" else ""
        return f"ranks are whole{rounding} and 1 at least, and what isn't a dense linear stays as it is"

    def _free(self, emulator: Emulator, context: Context) -> FreeBySlot:
        """What has a free order in each block; not looked for where nothing depends on it."""
        if self.rules.mlp == self.rules.attention and not self.rules.differences:
            return {}
        return find_free(emulator, context, values=has_differences(self.rules.attention))

    @property
    def _reorders(self) -> bool:
        return self.reorder and self.rules.differences

    def _moved(
        self, emulator: Emulator, context: Context, budget: int, penalties: Penalties, free: FreeBySlot
    ) -> Emulator:
        """Every matrix that is to be cut moved by its penalty's proximal operator, and cut, one block at a time."""
        orders: dict[int, tuple[Order, ...]] = {}

        def opened(slot: int, moments: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Tensor]]:
            """A copy of a block in its new order, and its inputs' moments in the same."""
            block = working_copy(emulator.blocks[slot].module, context.device)
            if slot not in orders:
                parts = free.get(slot, ()) if self._reorders else ()
                orders[slot] = tuple(find_order(block, part, self.rules.dims) for part in parts)
            for order in orders[slot]:
                put_in_order(block, order)
                moments = reordered_moments(moments, order)
            return block, moments

        def moved(linear: nn.Module, place: Place, moments: Tensor | None) -> Tensor:
            return proximal(linear_weight(linear).detach(), penalties.get(place, ()), self.strength, moments)

        # Functions of their own, so that nothing of one block is left in memory when the next is opened.
        def spectra_of(slot: int, seen: Mapping[str, Tensor]) -> dict[Place, Tensor]:
            block, moments = opened(slot, seen)
            return {
                (slot, path): spectrum(moved(linear, (slot, path), moments.get(path)), moments.get(path))
                for path, linear in dense_linears(block)
            }

        def cut(slot: int, seen: Mapping[str, Tensor], ranks: Mapping[Place, int]) -> nn.Module:
            block, moments = opened(slot, seen)
            for path, linear in list(dense_linears(block)):
                if (slot, path) in ranks:
                    weight = moved(linear, (slot, path), moments.get(path))
                    cut_to(block, path, weight, ranks[slot, path], moments.get(path))
            return sent_home(block, context)

        if self.rank == "energy":
            spectra: dict[Place, Tensor] = {}
            for slot, seen in self._visits(emulator, context, "smooth: spectra"):
                spectra |= spectra_of(slot, seen)
            ranks = ranks_by_energy(emulator, budget, spectra)
        else:
            ranks = ranks_by_size(emulator, budget)
        modules = {slot: cut(slot, seen, ranks) for slot, seen in self._visits(emulator, context, "smooth prox")}
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
        self, emulator: Emulator, context: Context, budget: int, penalties: Penalties, free: FreeBySlot
    ) -> Emulator:
        """Put in a smoother order, trained under the penalties, and cut."""

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
        trained = train_smooth(self._reordered(emulator, context, free), context, options, penalties, ranks)
        weights = {place: linear_weight(linear).detach() for place, linear in places(trained).items()}
        for (slot, path), rank in ranks(weights).items():
            cut_to(trained.blocks[slot].module, path, weights[slot, path].double(), rank)
        return trained

    def _reordered(self, emulator: Emulator, context: Context, free: FreeBySlot) -> Emulator:
        if not self._reorders:
            return emulator
        blocks = []
        for slot, block in enumerate(context.track(emulator.blocks, "smooth: reorder", total=len(emulator.blocks))):
            module = working_copy(block.module, context.device)
            for part in free.get(slot, ()):
                reorder(module, part, self.rules.dims)
            blocks.append(EmulatorBlock(sent_home(module, context), block.origin))
        return Emulator(blocks, dict(emulator.layout))

    def _notes(self, emulator: Emulator, free: FreeBySlot) -> tuple[str, ...]:
        linears = [slot for slot, block in enumerate(emulator.blocks) if any(dense_linears(block.module))]
        parts = {slot: free.get(slot, ()) for slot in linears}
        channels = sum(not any(isinstance(part, ChannelChain) for part in parts[slot]) for slot in linears)
        values = sum(not any(isinstance(part, ValueDims) for part in parts[slot]) for slot in linears)
        count, notes = len(emulator.blocks), []
        if has_differences(self.rules.mlp) and channels:
            notes.append(
                f"smooth found no MLP channels whose order is free in {channels} of {count} blocks, so all their "
                f"linears were treated as attention ({self.attention})"
            )
        if has_differences(self.rules.attention) and values and self.mode == "prox":
            notes.append(
                f"smooth found no values whose order is free inside attention heads in {values} of {count} blocks, so "
                "all linears of attention there were treated with the nuclear norm"
            )
        return tuple(notes)


def reordered_moments(moments: Mapping[str, Tensor], order: Order) -> Mapping[str, Tensor]:
    """``moments`` [in, in] by path with the inputs of linears in the ``order`` that a block was put in."""
    return {
        path: moment[order.columns[path]][:, order.columns[path]] if path in order.columns else moment
        for path, moment in moments.items()
    }


def _check_trainable(emulator: Emulator) -> None:
    refuse_packed(emulator, Smooth.name)
    if not places(emulator):
        raise EmulatorError("smooth: no dense linear is left to cut; put smooth before what replaces linears")
