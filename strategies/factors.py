"""Mathematics of LoRA factors on the server: averages of products, and the best factors of a given rank for one.

Data owner i with weight p_i (they sum to 1) holds B_i [out, r] and A_i [r, in] for a linear; the change that it wants
is s B_i A_i, with the same s = alpha / r for all. What should be added is the average of the products, sum p_i B_i A_i;
averaging the factors gives (sum p_i B_i)(sum p_i A_i) instead. The two differ by

    sum p_i (B_i - mean B)(A_i - mean A),

the covariance of the factors between the data owners: nothing while they agree in one factor, and the larger, the more
differently they move (arXiv 2403.12313, 2409.05976). Nothing here ever forms an [out, in] matrix: stacking gives
sum p_i B_i A_i = [p_1 B_1, ..., p_n B_n] [A_1; ...; A_n].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from offsite_fl.errors import WireError
from offsite_fl.models.head import is_head
from offsite_fl.tuning.lora import A, B

Tensors = Mapping[str, Tensor]


def linears(names: Mapping[str, object]) -> list[str]:
    """Slot names of the linears that have factors in ``names``; ``WireError`` names a factor without its other half.

    Tensors of a head have none.
    """
    found = []
    for name in names:
        if is_head(name):
            continue
        linear = name.removesuffix(A).removesuffix(B)
        if linear == name or not {linear + A, linear + B} <= names.keys():
            raise WireError(f"{name!r} isn't one of a pair of LoRA factors {A} and {B}")
        if name.endswith(A):
            found.append(linear)
    return found


def shares(weights: Sequence[float]) -> list[float]:
    """``weights`` scaled to sum to 1; ``WireError`` if there are none or they don't sum to more than 0."""
    total = sum(weights)
    if not total > 0:
        raise WireError(f"the weights of the replies sum to {total}, must be above 0")
    return [weight / total for weight in weights]


def stacked(updates: Sequence[Tensors], weights: Sequence[float], linear: str) -> tuple[Tensor, Tensor]:
    """B [out, n r] and A [n r, in], fp64, whose product is the average of the products (stacking, arXiv 2409.05976)."""
    parts = list(zip(updates, shares(weights), strict=True))
    up = torch.cat([share * update[linear + B].double() for update, share in parts], dim=1)
    down = torch.cat([update[linear + A].double() for update, _ in parts], dim=0)
    return up, down


def refactored(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The factors of ``rank`` whose product is nearest to ``up @ down`` in the Frobenius norm (Eckart and Young).

    ``up``: [out, k], ``down``: [k, in]. With up = Q_u R_u and down^T = Q_d R_d the singular values of the product are
    those of R_u R_d^T, which is at most k by k: O((out + in) k^2) instead of a singular value decomposition of
    [out, in].

    The result is B = U S [out, rank] and A = V^T [rank, in]: components in order of their singular values, all of them
    in B, and rows of A orthonormal. So a component of singular value zero has a B of zeros but a living A, as in a
    fresh LoRA, and can be trained; sqrt(S) on both sides would leave it without any gradient, for ever. The largest
    entry of each row of A is positive, which makes the factors unique where the singular values differ. The third value
    is the share of the squared norm that was cut off, 0 where the product's rank is at most ``rank``.
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    new_up, new_down = (q_up @ u[:, :rank]) * s[:rank], vt[:rank] @ q_down.T
    largest = new_down.gather(1, new_down.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(new_down.dtype)
    energy = float(s.square().sum())
    lost = float(s[rank:].square().sum()) / energy if energy > 0 else 0.0
    return _wide(new_up * signs.T, rank), _wide((new_down * signs).T, rank).T, lost


def _wide(columns: Tensor, rank: int) -> Tensor:
    """Columns of zeros behind, up to ``rank``: a linear smaller than the rank has no more components."""
    return torch.nn.functional.pad(columns, (0, rank - columns.shape[1]))


def bias(updates: Sequence[Tensors], weights: Sequence[float], linear: str) -> float:
    """How far plain averaging of the factors is off: ||mean B mean A - mean of B A|| / ||mean of B A||, Frobenius.

    From the covariance, which loses no digits where the two are near; 0 where the mean product is zero.
    """
    parts = list(zip(updates, shares(weights), strict=True))
    mean = {
        ending: torch.stack([share * update[linear + ending].double() for update, share in parts]).sum(0)
        for ending in (A, B)
    }
    up = torch.cat([share * (update[linear + B].double() - mean[B]) for update, share in parts], dim=1)
    down = torch.cat([update[linear + A].double() - mean[A] for update, _ in parts], dim=0)
    exact = _norm(*stacked(updates, weights, linear))
    return _norm(up, down) / exact if exact > 0 else 0.0


def _norm(up: Tensor, down: Tensor) -> float:
    """||up @ down||, Frobenius."""
    return float(torch.linalg.matrix_norm(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T))
