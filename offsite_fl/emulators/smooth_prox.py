"""The matrix nearest to a given one under a penalty: ``argmin 1/2 ||W - W0||_F^2 + lam R(W)`` in closed form.

For the nuclear norm it has the singular values less ``lam``, for R_1 and R_2 it is ``(I + 2 lam D'D)^-1 W0`` with the
difference matrix D: a banded system, solved in O(m n). For their sum it has both D'D. All in fp64.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from offsite_fl.emulators.penalties import ORDERS, Penalty

# What one row of the difference matrix does to neighbouring channels.
_STENCILS = {1: (-1.0, 1.0), 2: (1.0, -2.0, 1.0)}


@torch.no_grad()
def proximal(weight: Tensor, penalties: Sequence[Penalty], lam: float, moments: Tensor | None = None) -> Tensor:
    """``weight`` [out, in] moved towards low rank by the sum of ``penalties``; fp64, as it is without any or at 0.

    ``penalties`` are the nuclear norm alone, or differences along the same channels. ``lam`` is free of scale: it
    minimises ``1/2 ||W - W0||^2 / ||W0||_F^2 + lam ||W||_* / ||W0||_F`` for the nuclear norm and
    ``1/(m n) (1/2 ||W - W0||^2 + lam R(W))`` for differences. With ``moments`` C = E[x x'] [in, in] of its inputs the
    nuclear norm is that of ``W C^1/2``, and so is the distance. Differences of outputs come out the same with and
    without, those of inputs are taken without.
    """
    exact = weight.double()
    if not penalties or lam == 0:
        return exact
    first = penalties[0]
    if first.kind == "nuc":
        assert len(penalties) == 1  # of its sum with differences there is no closed form
        image = exact if moments is None else exact @ moments
        size = (image * exact).sum().clamp(min=0).sqrt()
        return shrink(exact, lam * float(size), moments)
    assert all((p.norm, p.dims) == ("l2sq", first.dims) for p in penalties) and len(first.dims) == 1
    (dim,) = first.dims
    rows = exact if dim == "out" else exact.T
    orders = [ORDERS[penalty.kind] for penalty in penalties]
    moved = torch.cat([smoothed(run, orders, lam) for run in rows.chunk(first.runs_along(dim))])
    return moved if dim == "out" else moved.T


def shrink(weight: Tensor, threshold: float, moments: Tensor | None = None) -> Tensor:
    """``U (S - threshold)_+ V'`` of ``weight`` [out, in] fp64; with ``moments`` C, of ``W C^1/2``, mapped back."""
    basis, core = None, weight
    if weight.shape[0] > weight.shape[1]:
        basis, core = torch.linalg.qr(weight)
    squares, vectors = torch.linalg.eigh((core if moments is None else core @ moments) @ core.T)
    values = squares.clamp(min=0).sqrt()
    share = (values - threshold).clamp(min=0) / values.clamp(min=torch.finfo(values.dtype).tiny)
    shrunk: Tensor = (vectors * share) @ (vectors.T @ core)
    return shrunk if basis is None else basis @ shrunk


def smoothed(rows: Tensor, orders: Collection[int], lam: float) -> Tensor:
    """``(I + 2 lam sum D'D)^-1 rows`` for ``rows`` [m, n], a sum over differences of first (1) and second order (2).

    >>> smoothed(torch.tensor([[0.0], [1.0]]).double(), [1], 0.5)
    tensor([[0.3333],
            [0.6667]], dtype=torch.float64)
    """
    width = max(orders)
    pivots, factors = _factored(_bands(len(rows), orders, 2 * lam))
    solved = list(rows)
    for i in range(len(solved)):
        for k in range(1, min(width, i) + 1):
            solved[i] = solved[i] - factors[k - 1][i - k] * solved[i - k]
    for i in range(len(solved) - 1, -1, -1):
        solved[i] = solved[i] / pivots[i]
        for k in range(1, min(width, len(solved) - 1 - i) + 1):
            solved[i] = solved[i] - factors[k - 1][i] * solved[i + k]
    return torch.stack(solved)


def _bands(count: int, orders: Collection[int], weight: float) -> list[list[float]]:
    """Diagonals of ``I + weight sum D'D`` [count, count]: entry i of band k stands in row i + k and column i."""
    bands = [[1.0] * count] + [[0.0] * count for _ in range(max(orders))]
    for order in orders:
        stencil = _STENCILS[order]
        for start in range(count - order):
            for a in range(order + 1):
                for b in range(a + 1):
                    bands[a - b][start + b] += weight * stencil[a] * stencil[b]
    return bands


def _factored(bands: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    """``L diag(pivots) L'`` of a banded matrix; ``factors[k - 1][i]`` stands in row i + k and column i of L."""
    count, width = len(bands[0]), len(bands) - 1
    pivots, factors = [0.0] * count, [[0.0] * count for _ in range(width)]
    for i in range(count):
        earlier = range(max(0, i - width), i)
        pivots[i] = bands[0][i] - sum(factors[i - j - 1][j] ** 2 * pivots[j] for j in earlier)
        for k in range(1, width + 1):
            both = (j for j in earlier if i + k - j <= width)
            used = sum(factors[i + k - j - 1][j] * pivots[j] * factors[i - j - 1][j] for j in both)
            factors[k - 1][i] = (bands[k][i] - used) / pivots[i]
    return pivots, factors
