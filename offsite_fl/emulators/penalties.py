"""Penalties under which a weight matrix is near to one of low rank, from Smooth Model Compression (arXiv 2505.24469).

``R_nuc = ||W||_*``, ``R_1 = sum_i ||w_(i+1) - w_i||^2`` and ``R_2 = sum_i ||w_(i+1) - 2 w_i + w_(i-1)||^2`` for the
rows w_i of W, its output channels. R_nuc doesn't depend on the order of the channels, R_1 and R_2 do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["nuc", "d1", "d2"]
Dim = Literal["out", "in"]
Norm = Literal["l2sq", "l1"]

ORDERS: dict[Kind, int] = {"d1": 1, "d2": 2}


@dataclass(frozen=True)
class Penalty:
    """One penalty on one matrix: which, and for differences along which channels.

    ``norm`` says whether differences are squared or taken by their absolute value. ``runs`` is the number of equal runs
    that the output channels consist of (two for a fused gate and up, one for each head of values), ``runs_in`` that of
    the inputs; there is no difference from one run to the next.
    """

    kind: Kind
    dims: tuple[Dim, ...] = ("out",)
    norm: Norm = "l2sq"
    runs: int = 1
    runs_in: int = 1

    def runs_along(self, dim: Dim) -> int:
        """The number of runs of the channels along ``dim``."""
        return self.runs if dim == "out" else self.runs_in

    def normalised(self, weight: Tensor) -> Tensor:
        """The penalty of ``weight`` [m, n] with its root mean square as the unit, taken as a constant; a scalar.

        That is R_nuc / ||W||_F, and R_1 or R_2 / (m n) of W / rms. With R / (m n) of W itself, small weights would make
        differences weigh nothing beside a nuclear norm at the same factor. Differentiable; in a training loop the
        nuclear norm has a cheaper form (:func:`nuclear_subgradient`).
        """
        size = frobenius(weight)
        if self.kind == "nuc":
            return nuclear_norm(weight) / size
        order = ORDERS[self.kind]
        parts = [roughness(weight, order, dim, self.norm, self.runs_along(dim)) for dim in self.dims]
        unit = size / math.sqrt(weight.numel())
        return torch.stack(parts).sum() / weight.numel() / unit ** (2 if self.norm == "l2sq" else 1)


def roughness(weight: Tensor, order: int, dim: Dim = "out", norm: Norm = "l2sq", runs: int = 1) -> Tensor:
    """R_1 (``order`` 1) or R_2 (2) of ``weight`` [out, in] along ``dim``, or with absolute values in place of squares.

    >>> roughness(torch.tensor([[1.0], [2.0], [4.0]]), 1), roughness(torch.tensor([[1.0], [2.0], [4.0]]), 2)
    (tensor(5.), tensor(1.))
    """
    rows = weight if dim == "out" else weight.T
    steps = rows.reshape(runs, -1, rows.shape[1]).diff(n=order, dim=1)
    total: Tensor = steps.square().sum() if norm == "l2sq" else steps.abs().sum()
    return total


def nuclear_norm(weight: Tensor) -> Tensor:
    """The sum of the singular values of ``weight``; a scalar."""
    total: Tensor = torch.linalg.svdvals(weight).sum()
    return total


@torch.no_grad()
def nuclear_subgradient(weight: Tensor) -> Tensor:
    """``U V'`` for ``weight = U S V'`` without the directions of singular value 0; the shape of ``weight``.

    ``(U V' * W).sum()`` is the nuclear norm and has this gradient, so between two decompositions it stands for it.
    """
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    there = s > torch.finfo(s.dtype).eps * max(weight.shape) * s[0]
    slope: Tensor = (u * there) @ vt
    return slope


def frobenius(weight: Tensor) -> Tensor:
    """``||W||_F`` without gradient, above 0."""
    norm: Tensor = weight.detach().norm().clamp(min=torch.finfo(weight.dtype).tiny)
    return norm
