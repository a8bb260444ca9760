"""The two factors of a linear's KFAC curvature and its gradient, gathered token by token on a backward pass.

For ``y = W x`` and the loss's gradient ``gy`` at ``y``, KFAC takes the Hessian of the loss in W for the map
``D -> G D A`` with ``A = E[x x']`` and ``G = E[gy gy']`` (the empirical Fisher, undamped: nothing is inverted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offsite_fl.emulators.backward import Watched
from offsite_fl.emulators.factor import PANEL
from offsite_fl.emulators.streams import TextBatch
from offsite_fl.errors import EmulatorError


@dataclass(frozen=True)
class Moments:
    """Means over tokens for one linear, fp32; x is what it reads, gy the summed loss's gradient at what it writes.

    ``inputs`` is A = E[x x'] [in, in], ``outputs`` G = E[gy gy'] [out, out], ``gradient`` g = E[gy x'] [out, in].
    """

    inputs: Tensor
    outputs: Tensor
    gradient: Tensor


class MomentSums:
    """Sums over the tokens of all batches, padding left out; linears that read the same tensor share their A.

    Args:
        groups: paths of linears by what they read, as :func:`~offsite_fl.emulators.groups.plan_block` has them.
        parts: by path, in how many equal runs of outputs a linear counts as several (two for a fused gate and up); one
            where the path is absent.
    """

    def __init__(self, groups: Sequence[Sequence[str]], parts: Mapping[str, int]) -> None:
        self.groups, self.parts, self.tokens = groups, parts, 0
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        """All linears that are watched."""
        return tuple(path for group in self.groups for path in group)

    def add(self, batch: TextBatch, watched: Mapping[str, Watched]) -> None:
        """Add the real tokens of ``batch``, as :meth:`~offsite_fl.emulators.backward.BackwardPass.back` hands it on."""
        for group in self.groups:
            x = batch.rows(watched[group[0]].inputs).float()
            _add_gram(self._inputs.setdefault(group[0], _square(x)), x)
            for path in group:
                gy = batch.rows(watched[path].gradient).float()
                runs = gy.chunk(self.parts.get(path, 1), dim=1)
                for total, run in zip(self._outputs.setdefault(path, [_square(r) for r in runs]), runs, strict=True):
                    _add_gram(total, run)
                self._gradients.setdefault(path, gy.new_zeros(gy.shape[1], x.shape[1])).addmm_(gy.T, x)
        self.tokens += len(x)

    def means(self, where: str) -> dict[str, tuple[Moments, ...]]:
        """Moments of each linear, one entry a part; the sums are used up. ``EmulatorError`` names ``where``."""
        found: dict[str, tuple[Moments, ...]] = {}
        for group in self.groups:
            inputs = self._mean(_mirrored(self._inputs[group[0]]))
            for path in group:
                outputs = [self._mean(_mirrored(total)) for total in self._outputs[path]]
                gradients = self._mean(self._gradients[path]).chunk(len(outputs))
                found[path] = tuple(Moments(inputs, g, d) for g, d in zip(outputs, gradients, strict=True))
                if not all(bool(torch.isfinite(t).all()) for t in (inputs, *outputs, *gradients)):
                    raise EmulatorError(
                        f"inputs or gradients of {path} in {where} aren't finite on the calibration text; is the "
                        "model's dtype fp16?"
                    )
        return found

    def _mean(self, total: Tensor) -> Tensor:
        return total.div_(max(1, self.tokens))


def _square(x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[1], x.shape[1])


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x' x`` to the upper half of ``total``; below the panels on the diagonal nothing is written."""
    width = len(total)
    for start in range(0, width, PANEL):
        total[start : start + PANEL, start:].addmm_(x[:, start : start + PANEL].T, x[:, start:])


def _mirrored(total: Tensor) -> Tensor:
    """``total`` with its lower half filled in from the upper one."""
    for start in range(0, len(total), PANEL):
        panel = slice(start, start + PANEL)
        total[start + PANEL :, panel] = total[panel, start + PANEL :].T
    return total
