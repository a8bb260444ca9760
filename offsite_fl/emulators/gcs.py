"""The gradient-preserving compression score of GradOT (arXiv 2507.04455) for parts of weights that can be taken out.

A change D of a weight scores ``||H D||_1 - lam * g . D``: how far the gradient moves, less what the loss rises to first
order. With KFAC, ``H D = G D A`` (:mod:`offsite_fl.emulators.kfac`). Every candidate is of rank one, so ``G D A`` is an
outer product and its norm the product of two norms. Candidates that go together score at most the sum of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """What the two terms of the score are divided by, and the weight ``lam`` of the second."""

    lam: float
    shift: float = 1.0
    slope: float = 1.0


@dataclass(frozen=True)
class Terms:
    """Of each of K candidates the gradient's shift ``||G D A||_1`` and the slope ``g . W_k`` (D is ``-W_k``), [K]."""

    shifts: Tensor
    slopes: Tensor

    def scores(self, scale: Scale) -> Tensor:
        """The score of taking out each candidate, [K]; those that should stay score high."""
        return self.shifts / scale.shift + scale.lam * self.slopes / scale.slope


@dataclass(frozen=True)
class Candidates:
    """Rank-one parts ``W_k`` of one matrix, or of the two or three of an MLP, that can be taken out.

    Each of ``pairs`` belongs to one matrix: left [m, K] and right [n, K] with ``G W_k A = left_k right_k'``.
    ``slopes`` [K] is ``g . W_k`` over all matrices.
    """

    pairs: tuple[tuple[Tensor, Tensor], ...]
    slopes: Tensor

    def terms(self) -> Terms:
        """Shift and slope of each candidate alone."""
        norms = [left.abs().sum(0) * right.abs().sum(0) for left, right in self.pairs]
        return Terms(torch.stack(norms).sum(0), self.slopes)

    def shifted(self, dropped: Tensor) -> list[Tensor]:
        """``G W A`` of each matrix for all ``dropped`` candidates (indices or mask) together."""
        return [left[:, dropped] @ right[:, dropped].T for left, right in self.pairs]

    def joint_score(self, dropped: Tensor, scale: Scale) -> float:
        """The score of taking out all ``dropped`` candidates (indices or mask) at once."""
        shift = sum(float(matrix.abs().sum()) for matrix in self.shifted(dropped))
        return shift / scale.shift + scale.lam * float(self.slopes[dropped].sum()) / scale.slope


def common_scale(terms: Iterable[Terms], lam: float, normalise: bool) -> Scale:
    """The scale for candidates that compete with one another.

    With ``normalise`` it is the mean shift and the mean absolute slope of them all, so that ``lam`` has no unit; else
    both are 1, the literal formula.
    """
    found = list(terms)
    if not normalise or not found:
        return Scale(lam)
    shift = torch.cat([t.shifts for t in found]).double().mean()
    slope = torch.cat([t.slopes for t in found]).double().abs().mean()
    return Scale(lam, float(shift) or 1.0, float(slope) or 1.0)


def always_kept(top: float, candidates: int) -> int:
    """How many candidates the share ``top`` is, rounded up.

    >>> always_kept(0.05, 2048), always_kept(0.05, 20), always_kept(0, 20)
    (103, 1, 0)
    """
    return math.ceil(Fraction(str(top)) * candidates)


def keep_best(scores: Tensor, count: int, always: int = 0) -> Tensor:
    """Indices, ascending, of ``count`` candidates: the first ``always``, then those of the highest scores.

    Of equal scores the first stays.
    """
    always = min(always, count)
    rest = scores[always:].sort(descending=True, stable=True).indices[: count - always] + always
    first = torch.arange(always, device=scores.device)
    return torch.cat([first, rest]).sort().values


def dropped_mask(kept: Tensor, candidates: int) -> Tensor:
    """Bool [candidates], False at the indices ``kept``."""
    mask = torch.ones(candidates, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask


# How many of the candidates that go, those of highest score, a pass tries to keep, and in the place of how many of
# those that stay. A trial costs as much as summing the matrices' entries, and far from the cut few swaps pay.
TRIED = 64
PARTNERS = 8


def exchange(candidates: Candidates, kept: Tensor, scale: Scale, passes: int, always: int = 0) -> Tensor:
    """Swap candidates in and out of ``kept`` as long as that lowers the joint score of those that go.

    A pass takes the dropped candidates in turn, the :data:`TRIED` of highest score from the highest down, tries to keep
    each in the place of one of the :data:`PARTNERS` kept ones of lowest score (never one of the first ``always``), and
    makes the best of the swaps if it lowers the joint score. Returns indices, ascending, as many as ``kept`` has.
    """
    scores = candidates.terms().scores(scale)
    dropped = dropped_mask(kept, len(scores))
    state = _Joint(candidates, scale, dropped.clone())
    for _ in range(passes):
        swapped = False
        for index in _by_score(scores, state.dropped, descending=True)[:TRIED]:
            fixed = state.dropped.clone()
            fixed[:always] = True
            swapped |= state.swap_in(index, _by_score(scores, fixed.logical_not(), descending=False)[:PARTNERS])
        if not swapped:
            break
    # The running sums carry rounding: what counts is the score computed afresh.
    better = candidates.joint_score(state.dropped, scale) < candidates.joint_score(dropped, scale)
    return (state.dropped if better else dropped).logical_not().nonzero().flatten()


class _Joint:
    """The dropped candidates and what they do to the gradient together, kept up to date through swaps."""

    def __init__(self, candidates: Candidates, scale: Scale, dropped: Tensor) -> None:
        self.candidates, self.scale, self.dropped = candidates, scale, dropped
        self._shifted = candidates.shifted(dropped)

    def swap_in(self, index: int, partners: Sequence[int]) -> bool:
        """Keep ``index`` and drop the one of ``partners`` that lowers the joint score most; False if none does."""
        without = self._moved(self._shifted, index, -1.0)
        now = self._shift(self._shifted) + self._slope(index)
        best, chosen = now - 1e-6 * abs(now), -1
        for partner in partners:
            value = self._shift(self._moved(without, partner, 1.0)) + self._slope(partner)
            if value < best:
                best, chosen = value, partner
        if chosen < 0:
            return False
        self._shifted = self._moved(without, chosen, 1.0)
        self.dropped[index], self.dropped[chosen] = False, True
        return True

    def _moved(self, matrices: Sequence[Tensor], index: int, sign: float) -> list[Tensor]:
        pairs = zip(matrices, self.candidates.pairs, strict=True)
        return [torch.addr(matrix, left[:, index], right[:, index], alpha=sign) for matrix, (left, right) in pairs]

    def _shift(self, matrices: Sequence[Tensor]) -> float:
        return sum(float(torch.linalg.vector_norm(matrix, 1)) for matrix in matrices) / self.scale.shift

    def _slope(self, index: int) -> float:
        return self.scale.lam * float(self.candidates.slopes[index]) / self.scale.slope


def _by_score(scores: Tensor, among: Tensor, *, descending: bool) -> list[int]:
    """Indices at which the mask ``among`` is set, sorted by score."""
    indices = among.nonzero().flatten()
    order: list[int] = indices[scores[indices].sort(descending=descending, stable=True).indices].tolist()
    return order
