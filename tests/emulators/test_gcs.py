"""The score's scale, the choice by scores, and the swaps that lower the joint score."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from offsite_fl.emulators.gcs import Candidates, Scale, Terms, common_scale, dropped_mask, exchange, keep_best


def random_candidates(count: int, seed: int) -> Candidates:
    """Three matrices, one of them wide, with slopes of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pairs = ((draw(5, count), draw(4, count)), (draw(3, count), draw(6, count)), (draw(2, count), draw(2, count)))
    return Candidates(pairs, draw(count))


def dense_joint(candidates: Candidates, dropped: list[int], scale: Scale) -> float:
    """The score of everything in ``dropped`` together, with every entry of every matrix summed on its own."""
    total = 0.0
    for left, right in candidates.pairs:
        for i in range(left.shape[0]):
            for j in range(right.shape[0]):
                total += abs(sum(float(left[i, k]) * float(right[j, k]) for k in dropped)) / scale.shift
    return total + scale.lam * sum(float(candidates.slopes[k]) for k in dropped) / scale.slope


def test_normalised_by_hand() -> None:
    terms = Terms(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([2.0, -1.0, 3.0]))
    scale = common_scale([terms], 0.5, True)
    assert_close(terms.scores(scale), torch.tensor([1 / 4 + 0.5, 3 / 4 - 0.25, 2 + 0.75]))
    # A matrix ten times as large is no other choice.
    larger = Terms(10 * terms.shifts, 100 * terms.slopes)
    assert_close(larger.scores(common_scale([larger], 0.5, True)), terms.scores(scale))


def test_literal_by_hand() -> None:
    terms = Terms(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([2.0, -1.0, 3.0]))
    assert_close(terms.scores(common_scale([terms], 0.5, False)), torch.tensor([2.0, 2.5, 9.5]))


def test_a_common_scale_is_over_all_candidates() -> None:
    few, many = Terms(torch.tensor([6.0]), torch.tensor([-2.0])), Terms(torch.ones(2), torch.tensor([0.0, 1.0]))
    assert common_scale([few, many], 0.1, True) == Scale(0.1, 8 / 3, 1.0)


def test_nothing_to_divide_by() -> None:
    terms = Terms(torch.zeros(3), torch.zeros(3))
    assert_close(terms.scores(common_scale([terms], 1.0, True)), torch.zeros(3))


@pytest.mark.parametrize(
    ("scores", "count", "always", "kept"),
    [
        ([1.0, 5.0, 2.0, 4.0], 2, 0, [1, 3]),
        ([1.0, 5.0, 2.0, 4.0], 2, 1, [0, 1]),
        ([1.0, 5.0, 2.0, 4.0], 3, 2, [0, 1, 3]),
        ([1.0, 5.0, 2.0, 4.0], 1, 3, [0]),
        ([2.0, 2.0, 2.0, 2.0], 2, 0, [0, 1]),
        ([-1.0, -3.0, -2.0], 2, 0, [0, 2]),
        ([1.0, 2.0], 2, 1, [0, 1]),
    ],
)
def test_the_best_are_kept_and_the_first_always(scores: list[float], count: int, always: int, kept: list[int]) -> None:
    assert keep_best(torch.tensor(scores), count, always).tolist() == kept


@pytest.mark.parametrize("seed", range(4))
def test_joint_score_is_the_dense_one_and_single_scores_bound_it(seed: int) -> None:
    candidates, scale = random_candidates(6, seed), Scale(0.7, 2.0, 3.0)
    scores = candidates.terms().scores(scale)
    for size in range(1, 7):
        for dropped in combinations(range(6), size):
            mask = torch.zeros(6, dtype=torch.bool)
            mask[list(dropped)] = True
            joint = candidates.joint_score(mask, scale)
            assert joint == pytest.approx(dense_joint(candidates, list(dropped), scale))
            bound = float(scores[list(dropped)].sum())
            assert joint <= bound + 1e-9
            if size == 1:
                assert joint == pytest.approx(bound)


def test_a_swap_by_hand() -> None:
    """0 and 1 nearly cancel, which their own scores (1, 1.2) can't tell; 2 scores 1.1. 0 and 2 go, then 0 and 1."""
    left = torch.tensor([[1.0, -1.2, 0.0, 0.0], [0.0, 0.0, 1.1, 5.0]])
    candidates = Candidates(((left, torch.ones(1, 4)),), torch.zeros(4))
    scale = Scale(0.0)
    greedy = keep_best(candidates.terms().scores(scale), 2)
    assert greedy.tolist() == [1, 3] and candidates.joint_score(dropped_mask(greedy, 4), scale) == pytest.approx(2.1)
    swapped = exchange(candidates, greedy, scale, 1)
    assert swapped.tolist() == [2, 3]
    assert candidates.joint_score(dropped_mask(swapped, 4), scale) == pytest.approx(0.2, abs=1e-6)


def test_what_always_stays_is_not_swapped_out() -> None:
    left = torch.tensor([[-1.2, 1.0, 0.0, 0.0], [0.0, 0.0, 1.1, 5.0]])
    candidates = Candidates(((left, torch.ones(1, 4)),), torch.zeros(4))
    assert exchange(candidates, torch.tensor([0, 3]), Scale(0.0), 2).tolist() == [2, 3]
    assert exchange(candidates, torch.tensor([0, 3]), Scale(0.0), 2, always=1).tolist() == [0, 3]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_swaps_never_make_it_worse_and_mostly_better(seed: int, lam: float) -> None:
    candidates = random_candidates(40, seed)
    scale = common_scale([candidates.terms()], lam, True)
    kept = keep_best(candidates.terms().scores(scale), 20, 2)
    before = candidates.joint_score(dropped_mask(kept, 40), scale)
    scores = [before]
    for passes in (1, 2):
        swapped = exchange(candidates, kept, scale, passes, 2)
        assert len(swapped) == 20 and {0, 1} <= set(swapped.tolist()) and len(set(swapped.tolist())) == 20
        scores.append(candidates.joint_score(dropped_mask(swapped, 40), scale))
    assert scores[0] > scores[1] >= scores[2]


def test_no_pass_no_swap() -> None:
    kept = torch.tensor([0, 5, 9])
    assert torch.equal(exchange(random_candidates(10, 0), kept, Scale(0.0), 0), kept)
