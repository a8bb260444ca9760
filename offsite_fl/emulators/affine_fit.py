"""The algebra of a closed-form change to an affine map: what must be added to its weight and bias, from sums alone."""

from __future__ import annotations

import torch
from torch import Tensor

from offsite_fl.emulators.factor import Refit, gram, project
from offsite_fl.errors import EmulatorError


class AffineFit:
    """Sums over tokens, in fp64, from which the change ``x -> D x + d`` of a linear is fitted.

    With ``x`` what the linear reads and ``e`` what is missing behind it, the change minimises
    ``sum ||e - D x - d||^2 + ridge * level * ||D||^2``. ``level`` is the mean of the inputs' variances, summed over
    the tokens, so ``ridge`` has no unit; ``d`` isn't held back. So means go apart: with ``C`` the centred
    ``sum x x'`` and ``R`` the centred ``sum e x'``, ``D = R (C + ridge * level * I)^-1`` and
    ``d = mean(e) - D mean(x)``.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.tokens = 0
        self._x, self._e = (torch.zeros(n, dtype=torch.float64, device=device) for n in (inputs, outputs))
        self._xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._ex = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor, missing: Tensor) -> None:
        """Count more tokens: ``x`` [tokens, inputs] and ``missing`` [tokens, outputs]."""
        x, missing = x.double(), missing.double()
        self.tokens += len(x)
        self._x += x.sum(0)
        self._e += missing.sum(0)
        self._xx += gram(x)
        self._ex += missing.T @ x

    def change(self, ridge: float, rank: int | None, where: str) -> tuple[Tensor, Tensor]:
        """``D`` [outputs, inputs] and ``d`` [outputs], fp64.

        With ``rank`` D is the best one of that rank: the error of a D' is that of D and
        ``||(D - D') (C + ridge * level * I)^1/2||_F^2``, so D is truncated in that norm (reduced-rank regression).
        ``EmulatorError`` names ``where`` if something isn't finite or ``ridge`` is too small.
        """
        mean_x, mean_e = self._x / self.tokens, self._e / self.tokens
        moments = self._xx - torch.outer(self._x, mean_x)
        residual = self._ex - torch.outer(self._e, mean_x)
        refit = Refit(moments, ridge, where)
        if not torch.isfinite(residual).all():
            raise EmulatorError(
                f"the hidden states behind {where} aren't finite on the calibration text; is the model's dtype fp16?"
            )
        change = refit.solve(torch.zeros_like(residual), residual)
        if rank is not None and rank < min(change.shape):
            damped = moments.clone()
            damped.diagonal().add_(ridge * moments.diagonal().mean())
            up, down = project(change, damped, rank)
            change = up @ down
        return change, mean_e - change @ mean_x
