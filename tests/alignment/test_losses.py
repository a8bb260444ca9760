"""KL of logits: zero for equals, positive otherwise, the padding counts for nothing."""

from __future__ import annotations

import math

import torch

from offsite_fl.alignment import losses
from offsite_fl.alignment.losses import kl_of_logits


def slow(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> float:
    total, count = 0.0, 0
    for b in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            if mask[b, t]:
                p = [math.exp(float(x)) for x in teacher[b, t]]
                q = [math.exp(float(x)) for x in student[b, t]]
                p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
                total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
                count += 1
    return total / count


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_the_sum_over_tokens_done_slowly(monkeypatch: object) -> None:
    teacher, student = random(2, 3, 5, seed=0), random(2, 3, 5, seed=1)
    expected = slow(teacher, student, MASK)
    assert abs(kl_of_logits(teacher, student, MASK).item() - expected) < 1e-6
    monkeypatch.setattr(losses, "_CHUNK", 5)  # type: ignore[attr-defined]  # one row at a time
    assert abs(kl_of_logits(teacher, student, MASK).item() - expected) < 1e-6


def test_zero_for_equals_and_positive_otherwise() -> None:
    teacher = random(2, 3, 5, seed=0)
    assert kl_of_logits(teacher, teacher + 7.0, MASK).item() < 1e-6  # a shift changes no distribution
    for seed in range(1, 20):
        assert kl_of_logits(teacher, random(2, 3, 5, seed=seed), MASK).item() > 0


def test_padding_counts_for_nothing() -> None:
    """Fault 17."""
    teacher, student = random(2, 3, 5, seed=0), random(2, 3, 5, seed=1)
    before = kl_of_logits(teacher, student, MASK)
    teacher[1, 1:], student[1, 1:] = 100.0, random(2, 5, seed=4) * 50
    assert torch.equal(kl_of_logits(teacher, student, MASK), before)


def test_its_gradient_is_the_difference_of_the_probabilities() -> None:
    teacher, student = random(2, 3, 5, seed=0), random(2, 3, 5, seed=1).requires_grad_()
    kl_of_logits(teacher, student, MASK).backward()
    expected = (student.softmax(-1) - teacher.softmax(-1)) * MASK[..., None] / MASK.sum()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-5, atol=1e-6)
