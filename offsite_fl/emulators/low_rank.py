"""Low-rank emulators: every linear of the frozen blocks becomes two factors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, copy_structure, register
from offsite_fl.emulators.budget import BudgetedMethod, emulator_bytes, largest_share
from offsite_fl.emulators.factor import cut_linear, rank_for
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.sequential import LowRankFit, fit_on_full_inputs, fit_sequentially
from offsite_fl.emulators.streams import sent_home, working_copy
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import is_linear, linear_weight
from offsite_fl.registry import near

Mode = Literal["sequential", "activation", "plain"]


@register("low-rank")
@dataclass(frozen=True)
class LowRank(BudgetedMethod):
    """Cut every linear of the frozen blocks to the same share of its parameters, as two factors.

    ``keep`` is the share of all bytes that stays, from which the share of a matrix follows: what isn't cut counts in
    full. At a share ``s`` a matrix gets rank ``max(1, floor(s * m * n / (m + n)))``; one that this wouldn't make
    smaller stays as it is, so ``keep=1`` changes nothing. ``mode``:

    * ``plain``: truncated SVD of each weight; needs no text.
    * ``activation``: truncated so that the error on the full model's own inputs is least.
    * ``sequential``: front to back, each matrix re-fitted on the inputs that the compressed blocks really give it, so
      that it puts right what went wrong before it (docs of :mod:`offsite_fl.emulators.sequential`).

    ``ridge`` ties the sequential re-fit to the original weight, in units of the inputs' mean square; more of it for
    less calibration text. ``targets`` names the linears to cut (``q_proj/o_proj``, matched as peft matches LoRA's) and
    leaves the others as they are; empty means every linear.
    """

    mode: Mode = "sequential"
    ridge: float = 0.01
    targets: tuple[str, ...] = ()

    grain: ClassVar[str] = (
        "ranks are whole, the same share of every linear rounded down and 1 at least, and what isn't a dense linear "
        "among the targets stays as it is"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.ridge > 0, f"low-rank ridge = {self.ridge!r} must be above 0")

    def reduce(self, emulator: Emulator, context: Context, budget: int | None) -> Emulator:
        """Return new blocks; what isn't a linear is shared with ``emulator``'s blocks."""
        assert budget is not None
        whole = LowRankFit(1.0, self.ridge, self.targets)
        _check_targets(emulator, whole)
        fit = replace(whole, keep=share_within(emulator, whole.takes, budget))
        if fit.keep >= 1:
            modules = {slot: copy_structure(block.module) for slot, block in enumerate(emulator.blocks)}
        elif self.mode == "plain":
            modules = dict(enumerate(_plain(block, context, fit) for block in self._tracked(emulator, context)))
        elif self.mode == "activation":
            modules = fit_on_full_inputs(emulator, context, fit)
        else:
            modules = fit_sequentially(emulator, context, fit)
        blocks = [EmulatorBlock(modules[slot], block.origin) for slot, block in enumerate(emulator.blocks)]
        return Emulator(blocks, dict(emulator.layout))

    def _tracked(self, emulator: Emulator, context: Context) -> Iterable[EmulatorBlock]:
        return context.track(emulator.blocks, "low-rank plain", total=len(emulator.blocks))


def share_within(emulator: Emulator, takes: Callable[[str], bool], budget: int) -> float:
    """The largest share of each linear that ``takes`` at which the emulator holds at most ``budget`` bytes.

    1 where nothing need be cut. Where even rank 1 is too much it is 0, which gives rank 1.
    """
    shapes: Counter[tuple[int, int, int]] = Counter()
    for block in emulator.blocks:
        for path, linear in dense_linears(block.module):
            if takes(path):
                weight = linear_weight(linear)
                shapes[(*weight.shape, weight.element_size())] += 1
    given = emulator_bytes(emulator)

    def held(share: float) -> int:
        saved = 0
        for (rows, columns, size), count in shapes.items():
            rank = rank_for(share, rows, columns)
            saved += 0 if rank is None else count * size * (rows * columns - rank * (rows + columns))
        return given - saved

    return largest_share(held, budget)


def _plain(block: EmulatorBlock, context: Context, fit: LowRankFit) -> nn.Module:
    cut = working_copy(block.module, context.device)
    for path, _ in list(dense_linears(cut)):
        if fit.takes(path):
            cut_linear(cut, path, fit.keep)
    return sent_home(cut, context)


def _check_targets(emulator: Emulator, fit: LowRankFit) -> None:
    """``EmulatorError`` names a target that is no linear of any block, with the near ones."""
    paths = {path for block in emulator.blocks for path, module in block.module.named_modules() if is_linear(module)}
    for target in fit.targets:
        if not any(map(replace(fit, targets=(target,)).takes, paths)):
            names = sorted({path.rpartition(".")[2] for path in paths})
            raise EmulatorError(f"low-rank: target {target!r} is no linear of the frozen blocks; {near(target, names)}")
