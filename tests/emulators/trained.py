"""A tiny model that has learned a little of a text, so that there is something to lose, and the text as batches."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import torch
from torch import nn

from offsite_fl.emulators.base import Batch
from offsite_fl.evaluation.loss import causal_nll
from tests.conftest import make_pico, make_tokenizer

WORDS = ("the", "light", "keeper", "went", "down", "stairs", "with", "oil", "bread", "letters", "boat", "blue", "seal")


def text_batches(count: int = 24, length: int = 32, size: int = 4) -> tuple[Batch, ...]:
    """Words in random order, letter by letter: ``count`` batches of ``size`` full rows of ``length`` tokens."""
    text = " ".join(random.Random(0).choices(WORDS, k=count * length * size))
    ids = make_tokenizer()(text[: count * size * length], return_tensors="pt", verbose=False)["input_ids"]
    return tuple(
        {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows.clone()}
        for rows in ids.view(count, size, length)
    )


def train(model: nn.Module, batches: tuple[Batch, ...], steps: int, after: Callable[[], object] = lambda: None) -> None:
    """``steps`` steps of AdamW on all weights; ``after`` is called behind each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        nats, tokens = causal_nll(model, batches[step % len(batches)])
        (nats / tokens).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        after()


@functools.cache
def trained_llama() -> tuple[nn.Module, tuple[Batch, ...], tuple[Batch, ...]]:
    """A pico LLaMA in eval mode after 100 steps, the batches that it was trained on, and four that it never saw."""
    batches = text_batches()
    model = make_pico("llama")
    train(model, batches[:-4], 100)
    return model, batches[:-4], batches[-4:]
