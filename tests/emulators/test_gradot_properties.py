"""GradOT on a trained model: the paper's two properties, of the gradient that is kept and of lambda."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite_fl.emulators.base import Batch, Context
from offsite_fl.emulators.gradients import emulator_gradients, full_gradients, match_gradients
from offsite_fl.emulators.gradot import GradOT
from offsite_fl.emulators.report import emulated_network
from offsite_fl.evaluation.loss import evaluate_loss

from .conftest import compressed, make_context

PUBLIC, OWN = 123, 7


def chain_text(rows: int, seed: int, language: int) -> Batch:
    """Token t is one of three that a table picks by tokens t-1 and t-2; ``language`` is the table."""
    table = torch.randint(4, 64, (8, 8, 3), generator=torch.Generator().manual_seed(language))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (rows, 24), generator=generator)
    for t in range(2, 24):
        pick = torch.randint(0, 3, (rows,), generator=generator)
        ids[:, t] = table[ids[:, t - 1] % 8, ids[:, t - 2] % 8, pick]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@dataclass(frozen=True)
class Trained:
    """A context with a model that knows the public language a little, and held-out text of both languages.

    As in offsite-tuning the adapter's gradient is taken on text of a data owner, whose language the model hasn't
    learnt: on its own training text a trained model's gradient is noise, which nothing can keep. The weights start
    large, so that much of what they hold is of no use. From small ones, which grow only where they are of use, the
    largest directions are the useful ones, and magnitude is as good a choice as curvature.
    """

    context: Context
    public: tuple[Batch, ...]
    own: tuple[Batch, ...]

    @cached_property
    def full(self) -> dict[str, Tensor]:
        return full_gradients(self.context, self.own)

    def cosine(self, method: GradOT, seed: int = 0) -> float:
        context = replace(self.context, seed=seed)
        ours = emulator_gradients(compressed(method, context), context, self.own)
        return match_gradients(ours, self.full).cosine

    def loss(self, method: GradOT) -> float:
        return evaluate_loss(emulated_network(compressed(method, self.context), self.context), self.public).loss


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config, **heads))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        text = chain_text(16, 1000 + step, PUBLIC)
        model(input_ids=text["input_ids"], labels=text["labels"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    calibration = tuple(chain_text(16, seed, PUBLIC) for seed in range(5))
    context = make_context(model.eval(), calibration=calibration)
    held_out = [tuple(chain_text(16, seed, language) for seed in range(50, 54)) for language in (PUBLIC, OWN)]
    return Trained(context, held_out[0], held_out[1])


def test_the_gradient_is_kept_better_than_by_magnitude_or_by_chance(trained: Trained) -> None:
    assert evaluate_loss(trained.context.model, trained.public).loss < 3.5  # ln 60 is 4.09: it did learn
    for keep in (0.3, 0.6):
        ours = trained.cosine(GradOT(keep, 0.0, 0.0))
        assert ours >= trained.cosine(GradOT(keep, score="magnitude"))
        assert all(ours > trained.cosine(GradOT(keep, score="random"), seed) + 0.05 for seed in (0, 1))


def test_the_loss_rises_with_lambda(trained: Trained) -> None:
    losses = [sum(trained.loss(GradOT(keep, lam, lam)) for keep in (0.3, 0.6)) / 2 for lam in (0.0, 0.3, 1.0, 3.0)]
    assert losses[0] + 0.01 < losses[1] < losses[2] < losses[3]
    # The budget spent in whichever block pays most keeps both properties.
    spread = [trained.loss(GradOT(0.4, lam, lam, allocation="global")) for lam in (0.0, 1.0)]
    assert spread[0] + 0.02 < spread[1]
