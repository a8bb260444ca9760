"""ScaleOT (arXiv 2412.09812): layers that matter least become small trained networks, attention loses rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, register
from offsite_fl.emulators.budget import (
    TOLERANCE,
    BudgetedMethod,
    count_parameters,
    emulator_bytes,
    largest_share,
    stored_bytes,
)
from offsite_fl.emulators.layer_replace import Replacements, ReplaceOptions, replace_layers
from offsite_fl.emulators.rank_share import cut_to_rank, saved_bytes
from offsite_fl.emulators.streams import sent_home, working_copy
from offsite_fl.emulators.watching import Watcher
from offsite_fl.errors import EmulatorError
from offsite_fl.models.harmonizer import Harmonizer

# Least share of the attention's rank that is left where a budget decides: the beta = 0.8 of a public re-implementation.
RANK_FLOOR = 0.2


@register("scaleot")
@dataclass(frozen=True)
class ScaleOT(BudgetedMethod):
    """Replace the layers that matter least by small trained networks, and cut the attention of the others in rank.

    arXiv 2412.09812. First, Dynamic LayerReplace (:mod:`offsite_fl.emulators.layer_replace`): ``steps`` times a network
    is sampled in which about half of every ``group`` layers run a harmonizer ``x + Up(ReLU(Down x))`` of rank ``rank``,
    which learns (AdamW, ``lr``) from the next-token loss; then ``samples`` networks are compared on another batch, and
    the layers that the better ones kept gain in score, ``s += eta * r * sigmoid(s) (1 - sigmoid(s))``. The model stays
    frozen. Second, the share ``alpha`` of the middle layers, those of the lowest scores, is replaced, and the attention
    of the others keeps the share ``rank_keep`` of its rank (the paper's beta is what goes), by a plain SVD. Their MLP
    stays verbatim. A matrix that two factors wouldn't make smaller stays too: a square one from ``rank_keep`` 0.5 on.

    The budget decides what isn't given. Neither given: attention goes down to 0.2 of its rank, then as few layers as
    possible are replaced, then attention gets the room that is left; so a small cut costs attention alone and needs no
    text. (Where whole layers would leave much of the budget unused, one less is replaced and attention goes lower.)
    Only ``alpha``: the rank fills the budget. Only ``rank_keep``: as few layers as possible. Both: they say it all.
    With a ``workdir`` the first stage resumes, and serves every budget once it is done.

    The paper's placement of the adapter by score isn't offered: the adapter stays where the owner's split puts it, and
    scores only say which layers of the middle are replaced.
    """

    alpha: float | None = None
    rank_keep: float | None = None
    steps: int = 300
    lr: float = 1e-3
    rank: int = 64
    group: int = 4
    samples: int = 3
    eta: float = 0.1

    grain: ClassVar[str] = (
        "layers are replaced whole, each by a network of its own, ranks are whole, and an MLP stays as it is"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha, rank_keep = self.alpha, self.rank_keep
        check(alpha is None or 0 <= alpha <= 1, f"scaleot alpha = {alpha!r} must be a share from 0 to 1")
        fits = rank_keep is None or 0 < rank_keep <= 1
        check(fits, f"scaleot rank-keep = {rank_keep!r} must be a share above 0 and at most 1")
        both = alpha is not None and rank_keep is not None
        check(not (both and self.bytes), "scaleot alpha and rank-keep fix the size together; leave bytes out")
        for name, least in (("steps", 1), ("rank", 1), ("group", 2), ("samples", 2)):
            value = getattr(self, name)
            check(value >= least, f"scaleot {name} = {value} must be at least {least}")
        check(self.lr > 0, f"scaleot lr = {self.lr!r} must be above 0")
        check(self.eta >= 0, f"scaleot eta = {self.eta!r} can't be negative")

    def budget(self, emulator: Emulator) -> int | None:
        """Bytes of the share that was asked for; None where ``alpha`` and ``rank_keep`` say it all."""
        return None if self.alpha is not None and self.rank_keep is not None else super().budget(emulator)

    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Return an emulator some of whose blocks are harmonizers; the other blocks share what wasn't cut."""
        sizes = _Sizes(emulator, context, self.rank)
        found = Replacements({}, {})
        if self._must_replace(sizes, budget):
            sizes.check_that_replacing_saves()
            options = ReplaceOptions(self.steps, self.lr, self.rank, self.group, self.samples, self.eta)
            found = replace_layers(emulator, context, options, sizes.features, sizes.returns)
        weakest = sorted(found.scores, key=lambda position: (found.scores[position], position))
        count = self._count(sizes, budget, weakest)
        replaced = weakest[:count]
        share = self._share(sizes, budget, replaced)
        return _built(emulator, context, {p: found.harmonizers[p] for p in replaced}, sizes, share)

    def _must_replace(self, sizes: _Sizes, budget: int | None) -> bool:
        if self.alpha is not None:
            return self._asked(sizes) > 0
        assert budget is not None
        return sizes.held((), self._floor) > budget

    @property
    def _floor(self) -> float:
        return RANK_FLOOR if self.rank_keep is None else self.rank_keep

    def _asked(self, sizes: _Sizes) -> int:
        assert self.alpha is not None
        return min(round(self.alpha * len(sizes.emulator.positions)), len(sizes.candidates))

    def _count(self, sizes: _Sizes, budget: int | None, weakest: Sequence[int]) -> int:
        """How many of the ``weakest`` places are replaced."""
        if self.alpha is not None:
            return min(self._asked(sizes), len(weakest))
        assert budget is not None
        enough = (n for n in range(len(weakest)) if sizes.held(weakest[:n], self._floor) <= budget)
        count = next(enough, len(weakest))
        if count and self.rank_keep is None:
            unused = budget - sizes.held(weakest[:count], 1.0)
            fewer = sizes.held(weakest[: count - 1], 0.0) <= budget
            count -= unused > TOLERANCE * budget and fewer
        return count

    def _share(self, sizes: _Sizes, budget: int | None, replaced: Sequence[int]) -> float:
        """The share of the attention's rank that stays."""
        if self.rank_keep is not None:
            return self.rank_keep
        assert budget is not None
        return largest_share(lambda share: sizes.held(replaced, share), budget)


class _Sizes:
    """What an emulator holds with some places replaced and attention cut, known before anything is built.

    ``features`` is the size of the hidden state, ``returns`` what blocks return, ``candidates`` are the positions that
    can be replaced, ``attention`` the attention's paths of each block of ``emulator``.
    """

    def __init__(self, emulator: Emulator, context: Context, rank: int) -> None:
        self.emulator = emulator
        watcher, first = Watcher(context), context.middle[0]
        self.features = watcher.noise.shape[-1]
        self.returns = watcher.returns(working_copy(context.block(first), context.device), first)
        # In the full model's own blocks: of what was replaced before a pass shows nothing.
        self.attention = tuple(
            watcher.watch(working_copy(context.block(block.origin), context.device), block.origin).attention
            for block in emulator.blocks
        )
        self.candidates = tuple(p for p in emulator.positions if not isinstance(emulator.at(p), Harmonizer))
        element = next(context.block(context.middle[0]).parameters()).element_size()
        self.harmonizer = count_parameters([Harmonizer(self.features, rank, device="meta")]) * element
        self._blocks = [stored_bytes([block.module]) for block in emulator.blocks]
        self._shared = emulator_bytes(emulator) - sum(self._blocks)  # below 0 where blocks share tensors
        self._places = Counter(emulator.layout.values())

    def held(self, replaced: Collection[int], share: float) -> int:
        """Bytes with the places ``replaced`` and the share ``share`` of the attention's rank kept."""
        gone = Counter(self.emulator.layout[position] for position in replaced)
        total = self._shared + len(replaced) * self.harmonizer
        for slot, block in enumerate(self.emulator.blocks):
            if gone[slot] < self._places[slot]:
                total += self._blocks[slot] - saved_bytes(block.module, self.attention[slot], share)
        return total

    def check_that_replacing_saves(self) -> None:
        """``EmulatorError`` if nothing is left to replace, or a harmonizer is no smaller than a block."""
        if not self.candidates:
            raise EmulatorError("scaleot: every block of the emulator is a harmonizer already; name it once in a chain")
        least = min(self._blocks[self.emulator.layout[position]] for position in self.candidates)
        if self.harmonizer >= least:
            raise EmulatorError(
                f"scaleot: a harmonizer takes {self.harmonizer} bytes and the smallest block {least}, so replacing "
                "saves nothing; choose a smaller rank"
            )


def _built(
    emulator: Emulator, context: Context, replaced: dict[int, Harmonizer], sizes: _Sizes, share: float
) -> Emulator:
    """``emulator`` with harmonizers at the places ``replaced`` and the attention of all other blocks cut."""
    blocks: list[EmulatorBlock] = []
    layout: dict[int, int] = {}
    known: dict[int, int] = {}
    for position in context.track(emulator.positions, "scaleot: attention", total=len(emulator.positions)):
        slot = emulator.layout[position]
        block = emulator.blocks[slot]
        if position not in replaced and slot in known:
            layout[position] = known[slot]
            continue
        layout[position] = len(blocks)
        if position in replaced:
            blocks.append(EmulatorBlock(replaced[position], block.origin))
        else:
            known[slot] = len(blocks)
            blocks.append(EmulatorBlock(_cut(block.module, context, sizes.attention[slot], share), block.origin))
    return Emulator(blocks, layout)


def _cut(block: nn.Module, context: Context, paths: tuple[str, ...], share: float) -> nn.Module:
    cut = working_copy(block, context.device)
    cut_to_rank(cut, paths, share)
    return sent_home(cut, context)
