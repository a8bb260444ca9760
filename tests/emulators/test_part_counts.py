"""Ranks and channels for a budget: the papers' counts, bytes by hand, and what goes where by score."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from offsite_fl.emulators.channels import ChannelChain
from offsite_fl.emulators.part_counts import count_at, counts_by_score, even_counts, held_bytes
from offsite_fl.emulators.parts import Part


def matrix(rows: int, columns: int, slot: int = 0, path: str = "q", size: int = 4) -> Part:
    return Part(slot, path, min(rows, columns), (rows + columns) * size, rows * columns * size)


def mlp(width: int, unit: int, slot: int = 0) -> Part:
    return Part(slot, ChannelChain(("up",), "down", width), width, unit, width * unit)


def test_counts_of_the_papers_models() -> None:
    """OPT-1.3B at 0.40: rank 410 of 2048 and 3277 of 8192 channels; OPT-6.7B at 18/28: rank round(1316.57)."""
    assert count_at(matrix(2048, 2048), 0.4) == 410
    assert count_at(mlp(8192, 2 * 2048 * 4), 0.4) == 3277
    assert count_at(matrix(4096, 4096), 18 / 28) == 1317
    assert count_at(matrix(192, 576), 0.5) == 72
    assert count_at(matrix(2048, 2048), 1e-6) == count_at(mlp(8, 4), 1e-6) == 1


def test_shares_are_exact() -> None:
    """0.07 * 100 is more than 7 in floats, and a channel more would be kept."""
    assert count_at(mlp(100, 4), 0.07) == 7
    assert matrix(3, 5).exact(0.1) == Fraction(15, 80)


def test_a_matrix_that_would_not_shrink_stays_dense() -> None:
    part = matrix(32, 32)
    assert part.held(15) == 15 * 64 * 4 and part.held(16) == part.held(20) == part.whole == 32 * 32 * 4
    wide = matrix(10, 90)
    assert wide.held(8) == 8 * 400 and wide.held(9) == wide.whole


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.77, 0.9])
def test_bytes_are_met_to_one_unit(keep: float) -> None:
    parts = [matrix(32, 32, 0, "q"), matrix(16, 32, 0, "k"), mlp(64, 3 * 32 * 4), matrix(32, 32, 1, "q"), mlp(48, 100)]
    budget = round(keep * sum(part.whole for part in parts))
    counts = even_counts(parts, budget)
    assert all(1 <= counts[part] <= part.candidates for part in parts)
    left = budget - held_bytes(counts)
    assert 0 <= left < max(part.unit for part in parts)
    # Nobody is more than two candidates from the common share.
    common = [float(counts[part] - part.exact(keep)) for part in parts if part.held(counts[part]) < part.whole]
    assert max(common) - min(common) < 2.5


def test_by_hand() -> None:
    """Two MLPs of 10 channels of 8 bytes: 100 bytes are 12 channels and 4 bytes that are of no use."""
    a, b = mlp(10, 8, 0), mlp(10, 8, 1)
    assert even_counts([a, b], 100) == {a: 6, b: 6}
    assert even_counts([a, b], 107) == {a: 7, b: 6}
    assert even_counts([a, b], 160) == {a: 10, b: 10}
    assert even_counts([a, b], 1) == {a: 1, b: 1}


def test_fixed_shares_leave_the_rest_to_the_others() -> None:
    q, m = matrix(32, 32), mlp(64, 100)
    budget = (q.whole + m.whole) // 2
    counts = even_counts([q, m], budget, keep_mha=0.25)
    assert counts[q] == 4
    assert counts[m] == (budget - 4 * q.unit) // 100
    counts = even_counts([q, m], budget, keep_mlp=0.75)
    assert counts[m] == 48 and counts[q] == (budget - 4800) // q.unit
    assert even_counts([q, m], None, 0.5, 0.1) == {q: 8, m: 7}


def test_scores_decide_across_parts() -> None:
    """Bytes for six channels: three of the first MLP's are worth most, then the second's, one each at least."""
    a, b = mlp(4, 10, 0), mlp(4, 10, 1)
    scores = {a: torch.tensor([1.0, 9.0, 8.0, 7.0]), b: torch.tensor([0.1, 6.0, 0.3, 0.2])}
    assert counts_by_score({a: 2, b: 2}, scores, {a: 0, b: 0}) == {a: 3, b: 1}
    assert counts_by_score({a: 3, b: 3}, scores, {a: 0, b: 0}) == {a: 4, b: 2}


def test_a_byte_counts_not_a_candidate() -> None:
    cheap, dear = mlp(4, 10, 0), mlp(4, 40, 1)
    scores = {cheap: torch.tensor([2.0, 2.0, 2.0, 2.0]), dear: torch.tensor([3.0, 3.0, 3.0, 3.0])}
    assert counts_by_score({cheap: 1, dear: 2}, scores, {cheap: 0, dear: 0}) == {cheap: 4, dear: 1}


def test_what_always_stays_comes_first() -> None:
    q, k = matrix(8, 8, 0, "q"), matrix(8, 8, 0, "k")
    scores = {q: torch.tensor([0.0] * 8), k: torch.tensor([9.0] * 8)}
    assert counts_by_score({q: 2, k: 2}, scores, {q: 2, k: 1}) == {q: 2, k: 2}
    assert counts_by_score({q: 2, k: 2}, scores, {q: 0, k: 0}) == {q: 1, k: 3}
    # Only one is affordable: one stays.
    assert counts_by_score({q: 1, k: 1}, scores, {q: 3, k: 3}) == {q: 1, k: 1}


def test_once_dense_nothing_is_spent_any_more() -> None:
    """The fourth rank of an 8 x 8 matrix makes it dense; what is left over goes to the other."""
    q, k = matrix(8, 8, 0, "q"), matrix(8, 8, 0, "k")
    scores = {q: torch.tensor([9.0] * 8), k: torch.tensor([1.0] * 8)}
    counts = counts_by_score({q: 3, k: 3}, scores, {q: 0, k: 0})
    assert q.held(counts[q]) == q.whole and counts[k] == 2
