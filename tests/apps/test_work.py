"""What full fine-tuning gets is what the federation did, counted by hand."""

from __future__ import annotations

from offsite_fl.apps import Work, sums_by_client
from offsite_fl.config import TuneConfig
from offsite_fl.evaluation.rounds import RoundRecord

# Two rounds: in the first a and b are there, in the second b alone; the third brought nothing.
HISTORY = [
    RoundRecord(0),
    RoundRecord(1, clients={"a": {"steps": 4, "tokens": 512}, "b": {"steps": 3, "tokens": 384}}),
    RoundRecord(2, clients={"b": {"steps": 5, "tokens": 640}}),
    RoundRecord(3),
]


def test_steps_are_the_busiest_owners_and_examples_are_everybodys() -> None:
    work = Work.of(HISTORY, ("c", "b", "a"), examples=lambda metrics: metrics["tokens"] / 32)
    # 4 + 5 steps; (512 + 384 + 640) / 32 = 48 examples in 9 steps: 5.33.
    assert work == Work(("b", "a"), 9, 5)
    assert Work.of([RoundRecord(0)], ("a", "b"), examples=lambda metrics: 1.0) == Work(("a", "b"), 1, 1)


def test_the_upper_bound_takes_as_many_examples_in_as_many_steps() -> None:
    tune = TuneConfig(
        max_steps=4, batch_size=4, lr=1e-3, proximal_mu=0.1, schedule="cosine", schedule_steps=16, schedule_offset=8
    )
    pooled = Work(("a", "b"), 9, 16).pooled(tune, lr=5e-5)
    assert (pooled.max_steps, pooled.batch_size * pooled.gradient_accumulation, pooled.lr) == (9, 16, 5e-5)
    assert (pooled.schedule, pooled.schedule_steps, pooled.schedule_offset, pooled.proximal_mu) == ("cosine", 9, 0, 0)


def test_sums_are_by_owner_over_all_rounds() -> None:
    assert sums_by_client(HISTORY, "tokens") == {"a": 512, "b": 1024}
