"""KL of logits: zero for equals, positive otherwise, the padding counts for nothing."""

from __future__ import annotations

import math

import torch

from offsite_fl.alignment import losses
from offsite_fl.alignment.losses import cosine_error, kl_of_logits


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


# Temperature --------------------------------------------------------------------------------------------------------


def test_a_temperature_by_hand() -> None:
    """Logits ln 16 and 0 at temperature 2 are ln 4 and 0: probabilities 0.8 and 0.2, against 0.5 and 0.5."""
    teacher, student = torch.tensor([[[math.log(16.0), 0.0]]]), torch.zeros(1, 1, 2)
    expected = 4 * (0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5))
    assert abs(kl_of_logits(teacher, student, torch.ones(1, 1), 2.0).item() - expected) < 1e-6


def test_a_temperature_of_one_changes_no_bit_and_equals_stay_zero() -> None:
    teacher, student = random(2, 3, 5, seed=0), random(2, 3, 5, seed=1)
    assert torch.equal(kl_of_logits(teacher, student, MASK, 1.0), kl_of_logits(teacher, student, MASK))
    for temperature in (0.5, 2.0, 10.0):
        assert kl_of_logits(teacher, teacher + 7.0, MASK, temperature).item() < 1e-5
        assert kl_of_logits(teacher, student, MASK, temperature).item() > 0


def test_at_a_high_temperature_it_is_the_squared_error_of_centred_logits() -> None:
    """Hinton et al., section 2.1: the gradient tends to that of half the squared error over the number of classes."""
    teacher, student = random(2, 3, 5, seed=0).double(), random(2, 3, 5, seed=1).double().requires_grad_()
    kl_of_logits(teacher, student, MASK, 300.0).backward()
    centred = [x - x.mean(-1, keepdim=True) for x in (student.detach(), teacher)]
    expected = (centred[0] - centred[1]) / 5 * MASK[..., None] / MASK.sum()
    torch.testing.assert_close(student.grad, expected, rtol=0.02, atol=1e-3)


# Cosine -------------------------------------------------------------------------------------------------------------


def test_a_cosine_by_hand() -> None:
    """Cosines 48 / 50, 0 and -1; what the mask leaves out is as far off as can be."""
    teacher = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [5.0, 5.0]]])
    student = torch.tensor([[[8.0, 6.0], [0.0, 9.0]], [[0.0, -1.0], [-5.0, -5.0]]])
    found = cosine_error(teacher, student, torch.tensor([[1, 1], [1, 0]]))
    assert abs(found.item() - (0.04 + 1.0 + 2.0) / 3) < 1e-6


def test_equal_directions_are_zero_whatever_their_length() -> None:
    teacher = random(2, 3, 5, seed=0)
    assert abs(cosine_error(teacher, 3.5 * teacher, MASK).item()) < 1e-6
    for seed in range(1, 20):
        assert 0 < cosine_error(teacher, random(2, 3, 5, seed=seed), MASK).item() <= 2


def test_a_cosine_of_padding_counts_for_nothing() -> None:
    """Fault 17, where the mean was forgotten too: twice the batch is the same loss."""
    teacher, student = random(2, 3, 5, seed=0), random(2, 3, 5, seed=1)
    before = cosine_error(teacher, student, MASK)
    teacher[1, 1:], student[1, 1:] = 100.0, -50.0
    assert torch.equal(cosine_error(teacher, student, MASK), before)
    doubled = cosine_error(torch.cat([teacher] * 2), torch.cat([student] * 2), torch.cat([MASK] * 2))
    torch.testing.assert_close(doubled, before)
