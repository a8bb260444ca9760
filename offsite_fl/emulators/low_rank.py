"""Low-rank emulators: every linear of the frozen blocks becomes two factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from offsite_fl.config import check
from offsite_fl.emulators.base import Context, Emulator, EmulatorBlock, EmulatorMethod, copy_structure, register
from offsite_fl.emulators.factor import cut_linear
from offsite_fl.emulators.groups import dense_linears
from offsite_fl.emulators.sequential import LowRankFit, fit_on_full_inputs, fit_sequentially
from offsite_fl.emulators.streams import sent_home, working_copy
from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import is_linear
from offsite_fl.registry import near

Mode = Literal["sequential", "activation", "plain"]


@register("low-rank")
@dataclass(frozen=True)
class LowRank(EmulatorMethod):
    """Cut every linear of the frozen blocks to a share of its parameters, as two factors.

    ``keep`` is that share: rank ``max(1, floor(keep * m * n / (m + n)))``; a matrix that this wouldn't make smaller
    stays as it is, so ``keep=1`` changes nothing. ``mode``:

    * ``plain``: truncated SVD of each weight; needs no text.
    * ``activation``: truncated so that the error on the full model's own inputs is least.
    * ``sequential``: front to back, each matrix re-fitted on the inputs that the compressed blocks really give it, so
      that it puts right what went wrong before it (docs of :mod:`offsite_fl.emulators.sequential`).

    ``ridge`` ties the sequential re-fit to the original weight, in units of the inputs' mean square; more of it for
    less calibration text. ``targets`` names the linears to cut (``q_proj/o_proj``, matched as peft matches LoRA's) and
    leaves the others as they are; empty means every linear.
    """

    keep: float = 0.5
    mode: Mode = "sequential"
    ridge: float = 0.01
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(0 < self.keep <= 1, f"low-rank keep = {self.keep!r} must be a share above 0 and at most 1")
        check(self.ridge > 0, f"low-rank ridge = {self.ridge!r} must be above 0")

    def compress(self, emulator: Emulator, context: Context) -> Emulator:
        """Return new blocks; what isn't a linear is shared with ``emulator``'s blocks."""
        fit = LowRankFit(self.keep, self.ridge, self.targets)
        _check_targets(emulator, fit)
        if self.keep >= 1:
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
