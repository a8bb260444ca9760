"""The algebra of low-rank factors: rank budgets, truncation weighted by inputs, and the ridge re-fit.

Everything works on second moments (``X'X``, ``X'Y``), never on the activations themselves, and in fp64: the moments of
language models are so uneven (a few tokens are a thousand times larger than the rest) that fp32 eigenvalues lose the
directions near the cut.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor, nn

from offsite_fl.errors import EmulatorError
from offsite_fl.models.linears import LowRankLinear, linear_bias, linear_weight, replace_module

# Width of the column panels of a Gram matrix; below it one product is faster than the upper half of several.
PANEL = 384


def rank_for(keep: float, rows: int, columns: int) -> int | None:
    """The rank at which two factors hold the share ``keep`` of a ``rows x columns`` matrix; None if it stays dense.

    ``max(1, floor(keep * m * n / (m + n)))``, exactly. A matrix stays dense at ``keep = 1`` and wherever the factors
    would hold as many numbers as the matrix itself.

    >>> rank_for(0.5, 576, 576), rank_for(1.0, 576, 576), rank_for(0.5, 2, 2)
    (144, None, None)
    """
    rank = max(1, math.floor(Fraction(str(keep)) * rows * columns / (rows + columns)))
    return None if keep >= 1 or rank * (rows + columns) >= rows * columns else rank


def gram(x: Tensor) -> Tensor:
    """``x' x`` in fp64 for ``x`` [tokens, features]; the products are fp32 and only the upper half is computed."""
    width = x.shape[1]
    out = torch.empty(width, width, dtype=torch.float64, device=x.device)
    for start in range(0, width, PANEL):
        panel = slice(start, min(start + PANEL, width))
        part = x[:, panel].T @ x[:, start:]
        out[panel, start:] = part.double()
        out[start:, panel] = part.T.double()
    return out


def project(weight: Tensor, moments: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-``rank`` matrix ``up @ down`` nearest to ``weight`` on inputs with the given second moments.

    Minimises ``||X (weight - up @ down)'||_F`` over all matrices of that rank: with V the leading eigenvectors of
    ``weight X'X weight'``, it is ``V (V' weight)``. Without moments it is the truncated SVD.

    Args:
        weight: [out, in], fp64.
        moments: ``X'X`` [in, in], fp64, or None for the identity.
        rank: number of directions kept, at most min(out, in).

    Returns:
        up [out, rank] and down [rank, in], scaled so that each direction's norm is split evenly between the two.
    """
    basis, core = None, weight
    if weight.shape[0] > weight.shape[1]:
        # A tall matrix reaches an in-dimensional space of outputs only: look for the directions there.
        basis, core = torch.linalg.qr(weight)
    image = core if moments is None else core @ moments
    _, vectors = torch.linalg.eigh(image @ core.T)
    kept = vectors[:, -rank:].flip(1)
    up, down = kept if basis is None else basis @ kept, kept.T @ core
    scale = down.norm(dim=1).sqrt().clamp(min=torch.finfo(down.dtype).tiny)
    return up * scale, down / scale.unsqueeze(1)


class Refit:
    """Ridge regression towards the original weight, for all matrices that read the same input.

    ``B = W + R (X'X + ridge * mean(diag X'X) * I)^-1`` where ``R = (Y - X W')' X`` is what is still wrong.
    """

    def __init__(self, moments: Tensor, ridge: float, where: str) -> None:
        if not torch.isfinite(moments).all():
            raise EmulatorError(
                f"the inputs of {where} aren't finite on the calibration text; is the model's dtype fp16?"
            )
        self.moments, self._factor = moments, None
        level = moments.diagonal().mean()
        if level > 0:
            damped = moments.clone()
            damped.diagonal().add_(ridge * level)
            self._factor, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                raise EmulatorError(f"ridge = {ridge} is too small for the calibration inputs of {where}; raise it")

    def solve(self, weight: Tensor, residual: Tensor | None) -> Tensor:
        """The re-fitted weight [out, in]; without a residual (or without any input) the weight as it is."""
        if residual is None or self._factor is None:
            return weight
        return weight + torch.cholesky_solve(residual.T, self._factor).T

    def factors(self, weight: Tensor, residual: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
        """Factors of the re-fitted weight at ``rank``, truncated with the same inputs in mind."""
        moments = None if self._factor is None else self.moments
        return project(self.solve(weight, residual), moments, rank)


def cut_linear(
    block: nn.Module, path: str, keep: float, refit: Refit | None = None, residual: Tensor | None = None
) -> None:
    """Replace the dense linear at ``path`` by two factors that hold the share ``keep``, unless that saves nothing.

    With ``refit`` the factors fit its inputs, and the weight is first corrected by ``residual``
    (``(Y - X W')' X``, [out, in]). The bias stays, the dtype too.
    """
    weight = linear_weight(block.get_submodule(path)).detach()
    rank = rank_for(keep, *weight.shape)
    if rank is None:
        return
    exact = weight.double()
    put_factors(block, path, *(project(exact, None, rank) if refit is None else refit.factors(exact, residual, rank)))


def put_factors(block: nn.Module, path: str, up: Tensor, down: Tensor) -> None:
    """Replace the dense linear at ``path`` by the factors ``up`` [out, rank] and ``down`` [rank, in].

    Bias, dtype and mode stay.
    """
    linear = block.get_submodule(path)
    dtype = linear_weight(linear).dtype
    new = LowRankLinear.from_factors(up.to(dtype), down.to(dtype), linear_bias(linear))
    replace_module(block, path, new.train(linear.training))
