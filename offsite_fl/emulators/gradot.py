"""GradOT (arXiv 2507.04455): an emulator that keeps the adapter's gradient and whose own loss is higher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from offsite_fl.config import check, check_choices
from offsite_fl.emulators.backward import BackwardPass
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, copy_structure, register
from offsite_fl.emulators.budget import BudgetedMethod, emulator_bytes
from offsite_fl.emulators.gcs import Scale, Terms, always_kept, common_scale, exchange, keep_best
from offsite_fl.emulators.kfac import MomentSums
from offsite_fl.emulators.part_counts import Counts, counts_by_score, even_counts
from offsite_fl.emulators.parts import BlockParts, Part, find_parts
from offsite_fl.emulators.scored_block import Score, ScoredBlock, Seen
from offsite_fl.emulators.streams import first_examples, sent_home, working_copy
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import is_linear, linear_weight

Allocation = Literal["matrix", "global"]


@register("gradot")
@dataclass(frozen=True)
class GradOT(BudgetedMethod):
    """Keep the attention ranks and MLP channels that matter to the adapter's gradient, and let the loss rise.

    arXiv 2507.04455. A change D of a weight scores ``||H D||_1 - lam * g . D``, H the loss's KFAC curvature and g its
    gradient on calibration text: low where the gradient hardly moves and the loss rises. Matrices outside MLPs (query,
    key, value, output) become factors of the singular directions whose removal scores highest, MLPs lose the channels
    whose removal scores lowest (:mod:`offsite_fl.emulators.rank_choice`, :mod:`offsite_fl.emulators.channel_choice`).
    Depth stays. Nothing is trained. The curvature of each weight itself stands in for that between it and the adapter.

    ``keep`` is the share of all bytes that stays; norms and what else can't be cut count in full. ``keep_mha`` and
    ``keep_mlp`` fix the share of attention and of MLPs; where only one is given the other is what the budget leaves,
    where both are, ``keep`` counts for nothing. ``lam_mha`` and ``lam_mlp`` are the weights of the loss: 0 keeps
    the gradient only, more makes the emulator worse. ``top`` is the share of a matrix's directions, the largest
    singular values, that always stays. With ``normalise`` both terms are divided by their mean (of absolute values)
    over a matrix or an MLP, so that the weights have no unit; without, the formula is literal. ``allocation=global``
    gives the bytes of attention, and those of MLPs, to the candidates of highest score a byte in whichever block, and
    takes the means over all of them. ``refine`` (2 at most) passes of swaps lower the score of everything that goes
    together, which the single scores only bound. ``tokens`` bounds the calibration text.

    ``score`` names two controls: ``magnitude`` keeps the largest singular values and the channels of largest L2 norm,
    ``random`` any (``top`` holds for both). They read no gradient and need no text.
    """

    lam_mha: float = 0.1
    lam_mlp: float = 0.1
    keep_mha: float | None = None
    keep_mlp: float | None = None
    top: float = 0.05
    normalise: bool = True
    allocation: Allocation = "matrix"
    refine: int = 0
    tokens: int = 4096
    score: Score = "gcs"

    grain: ClassVar[str] = "a matrix keeps a rank and an MLP a channel at least, and what is neither stays as it is"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        for name in ("lam_mha", "lam_mlp"):
            check(getattr(self, name) >= 0, f"gradot {name} = {getattr(self, name)!r} must be at least 0")
        for name in ("keep_mha", "keep_mlp"):
            share = getattr(self, name)
            check(share is None or 0 < share <= 1, f"gradot {name} = {share!r} must be a share above 0 and at most 1")
        check(not (self.bytes and self._both_fixed), "gradot: bytes say nothing where keep_mha and keep_mlp are given")
        check(0 <= self.top <= 1, f"gradot top = {self.top!r} must be a share between 0 and 1")
        check(self.refine in (0, 1, 2), f"gradot refine = {self.refine!r} must be 0, 1 or 2 passes")
        check(not self.refine or self.score == "gcs", f"gradot refine lowers the score gcs, not {self.score}")
        check(self.tokens >= 1, f"gradot tokens = {self.tokens!r} must be at least 1")

    @property
    def _both_fixed(self) -> bool:
        return self.keep_mha is not None and self.keep_mlp is not None

    def budget(self, emulator: Emulator) -> int | None:
        """Bytes that the result should hold; None where the shares of both parts are given."""
        return None if self._both_fixed else super().budget(emulator)

    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Return new blocks that share with ``emulator``'s whatever isn't cut."""
        found = find_parts(emulator, context)
        parts = [part for block in found.values() for part in block.parts]
        if not parts:
            raise EmulatorError(
                "gradot found no dense linear in any block that it could cut; what is low-rank or quantised already "
                "stays as it is, so put gradot first, as in 'gradot+quantize'"
            )
        fixed = emulator_bytes(emulator) - sum(part.whole for part in parts)
        counts = even_counts(parts, None if budget is None else budget - fixed, self.keep_mha, self.keep_mlp)
        found = self._scored(found, counts)
        modules: dict[int, nn.Module] = {}
        if found:
            if self.score == "gcs":
                _check_shapes(emulator, context, found)
            cut = self._in_one_go if self.allocation == "matrix" else self._after_all_scores
            modules = cut(emulator, context, found, counts)
        blocks = [
            EmulatorBlock(modules[slot] if slot in modules else copy_structure(block.module), block.origin)
            for slot, block in enumerate(emulator.blocks)
        ]
        return Emulator(blocks, dict(emulator.layout))

    def _scored(self, found: Mapping[int, BlockParts], counts: Counts) -> dict[int, BlockParts]:
        """The blocks and parts that must be scored: those that shrink, and with them all they share bytes with."""
        shrinking = {part for part in counts if _shrinks(part, counts)}
        if self.allocation == "global":
            kinds = {part.in_mlp for part in shrinking}
            shrinking = {part for part in counts if part.in_mlp in kinds}
        left = {slot: block.only(shrinking) for slot, block in found.items()}
        return {slot: block for slot, block in left.items() if block.parts}

    def _in_one_go(
        self, emulator: Emulator, context: Context, found: Mapping[int, BlockParts], counts: Counts
    ) -> dict[int, nn.Module]:
        """Every block is scored and cut as the backward pass comes by."""
        modules: dict[int, nn.Module] = {}

        def cut(slot: int, seen: Seen) -> None:
            work = ScoredBlock(working_copy(emulator.blocks[slot].module, context.device), seen)
            for part in found[slot].parts:
                terms = work.terms(part, self.score, context.seed)
                self._cut(work, part, terms, common_scale([terms], self._lam(part), self.normalise), counts[part])
            modules[slot] = sent_home(work.block, context)

        self._visit(context, found, cut)
        return modules

    def _after_all_scores(
        self, emulator: Emulator, context: Context, found: Mapping[int, BlockParts], counts: Counts
    ) -> dict[int, nn.Module]:
        """Of a first pass only scores are kept; blocks are cut in a second, on the text only if swaps need it."""
        terms: dict[Part, Terms] = {}
        modules: dict[int, nn.Module] = {}

        def score(slot: int, seen: Seen) -> None:
            work = ScoredBlock(working_copy(emulator.blocks[slot].module, context.device), seen)
            terms.update({part: work.terms(part, self.score, context.seed) for part in found[slot].parts})

        self._visit(context, found, score)
        scales, chosen = self._shared_out(terms, counts)

        def cut(slot: int, seen: Seen) -> None:
            work = ScoredBlock(working_copy(emulator.blocks[slot].module, context.device), seen)
            for part in (p for p in found[slot].parts if _shrinks(p, chosen)):
                self._cut(work, part, terms[part], scales[part], chosen[part])
            modules[slot] = sent_home(work.block, context)

        if self.refine:
            self._visit(context, found, cut)
        else:
            for slot in found:
                cut(slot, {})
        return modules

    def _shared_out(self, terms: Mapping[Part, Terms], counts: Counts) -> tuple[dict[Part, Scale], Counts]:
        """The scale of attention's parts and that of MLPs, and how many candidates of each part win within its kind."""
        scales: dict[Part, Scale] = {}
        chosen: Counts = {}
        for in_mlp in (False, True):
            group = {part: t for part, t in terms.items() if part.in_mlp == in_mlp}
            scale = common_scale(group.values(), self.lam_mlp if in_mlp else self.lam_mha, self.normalise)
            scores = {part: t.scores(scale) for part, t in group.items()}
            chosen |= counts_by_score({part: counts[part] for part in group}, scores, {p: self._top(p) for p in group})
            scales |= dict.fromkeys(group, scale)
        return scales, chosen

    def _visit(self, context: Context, found: Mapping[int, BlockParts], use: Callable[[int, Seen], None]) -> None:
        """Call ``use`` with each slot and the moments at its place, the last place first; controls have no moments."""
        if self.score != "gcs":
            for slot in context.track(list(found), f"gradot {self.score}"):
                use(slot, {})
            return
        batches = first_examples(context.need_calibration("gradot"), self.tokens)
        slots = {block.position: slot for slot, block in found.items()}
        passing = BackwardPass(context, batches, "gradot")
        places = range(context.blocks.depth - 1, min(slots) - 1, -1)
        for position in context.track(places, "gradot: backward", total=len(places)):
            if position not in slots:
                passing.back(position)
                continue
            block = found[slots[position]]
            sums = MomentSums(block.groups, block.runs)
            passing.back(position, sums.paths, sums.add)
            use(slots[position], sums.means(f"block {position}"))

    def _cut(self, work: ScoredBlock, part: Part, terms: Terms, scale: Scale, count: int) -> None:
        kept = keep_best(terms.scores(scale), count, self._top(part))
        if self.refine:
            kept = exchange(work.candidates(part), kept, scale, self.refine, self._top(part))
        work.keep(part, kept)

    def _lam(self, part: Part) -> float:
        return self.lam_mlp if part.in_mlp else self.lam_mha

    def _top(self, part: Part) -> int:
        return 0 if part.in_mlp else always_kept(self.top, part.candidates)


def _shrinks(part: Part, counts: Counts) -> bool:
    return part.held(counts[part]) < part.whole


def _check_shapes(emulator: Emulator, context: Context, found: Mapping[int, BlockParts]) -> None:
    """``EmulatorError`` unless the full model has a linear of the same shape wherever one is to be scored."""
    for slot, block in found.items():
        own, full = emulator.blocks[slot].module, dict(context.block(block.position).named_modules())
        for path in (path for group in block.groups for path in group):
            shape = tuple(linear_weight(own.get_submodule(path)).shape)
            theirs = full.get(path)
            there = tuple(linear_weight(theirs).shape) if theirs is not None and is_linear(theirs) else None
            if there != shape:
                what = "no dense linear" if there is None else f"one of {there[0]}x{there[1]}"
                raise EmulatorError(
                    f"gradot scores the emulator's weights by the full model's gradients, but {path} of emulator block "
                    f"{slot} is {shape[0]}x{shape[1]} and the full model has {what} at this place; put gradot first"
                )
