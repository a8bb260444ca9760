"""Dynamic rank decomposition of GradOT (arXiv 2507.04455): which singular directions of a matrix stay.

For ``W = sum_k s_k u_k v_k'``, taking direction k out scores
``c_k = s_k ||G u_k||_1 ||A v_k||_1 + lam * s_k u_k' g v_k`` (:mod:`offsite_fl.emulators.gcs`, exact for one direction).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offsite_fl.emulators.factor import put_factors
from offsite_fl.emulators.gcs import Candidates
from offsite_fl.emulators.kfac import Moments
from offsite_fl.models.linears import linear_weight


@dataclass(frozen=True)
class Directions:
    """Singular directions of a matrix [out, in], the largest first: ``u`` [out, K], ``s`` [K], ``v`` [in, K], fp32."""

    u: Tensor
    s: Tensor
    v: Tensor


def directions_of(linear: nn.Module) -> Directions:
    """The singular value decomposition of a dense linear's weight."""
    u, s, vt = torch.linalg.svd(linear_weight(linear).detach().float(), full_matrices=False)
    return Directions(u, s, vt.T)


def rank_candidates(directions: Directions, moments: Moments) -> Candidates:
    """Every singular direction as a candidate for taking out."""
    u, s, v = directions.u, directions.s, directions.v
    slopes = s * (u * (moments.gradient @ v)).sum(0)
    return Candidates(((moments.outputs @ (u * s), moments.inputs @ v),), slopes)


def keep_ranks(block: nn.Module, path: str, directions: Directions, kept: Tensor) -> None:
    """Replace the linear at ``path`` by two factors that hold its directions ``kept`` (int64).

    Each direction's singular value is split evenly between the factors. Bias, dtype and mode stay.
    """
    roots = directions.s[kept].sqrt()
    put_factors(block, path, directions.u[:, kept] * roots, (directions.v[:, kept] * roots).T)
