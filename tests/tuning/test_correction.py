"""SCAFFOLD's correction of gradients, and how far a tuning call says that it went, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from offsite_fl.config import TuneConfig
from offsite_fl.data.loader import make_loader
from offsite_fl.tuning.schedule import learning_rate
from offsite_fl.tuning.tune import tune


def examples():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 64, (10,), generator=generator).tolist() for _ in range(8)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def block(model):
    return {f"adapter.0.{name}": p for name, p in model.model.layers[0].named_parameters()}


def sgd(**settings):
    base = {"lr": 0.1, "batch_size": 4, "optimizer": "sgd", "device": "cpu", "progress": False, "clip_norm": 0.3}
    return TuneConfig(**(base | settings))


def test_the_correction_is_added_after_clipping(pico):
    config = sgd(max_steps=4, schedule="linear", schedule_steps=6)
    mine, plain = pico("llama"), pico("llama")
    correction = {name: torch.full_like(p, 0.02 * (i + 1)).detach() for i, (name, p) in enumerate(block(mine).items())}
    result = tune(mine, block(mine), examples(), config, correction=correction)
    loader = make_loader(examples(), 4, pad_id=0, shuffle=True, seed=0)
    batches = [batch for _ in range(2) for batch in loader]
    for step, batch in enumerate(batches):
        labels = batch.pop("labels")
        logits = plain(**batch).logits[:, :-1]
        gradients = torch.autograd.grad(
            F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()), list(block(plain).values())
        )
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm > 0.3  # it is really clipped
        with torch.no_grad():
            for (name, p), gradient in zip(block(plain).items(), gradients, strict=True):
                p -= learning_rate(config, step, 6) * (gradient * 0.3 / norm + correction[name])
    for name, p in block(plain).items():
        torch.testing.assert_close(result.tensors[name], p.detach(), rtol=1e-4, atol=1e-5)


def test_a_correction_of_zero_changes_no_bit(pico):
    one, other = pico("llama"), pico("llama")
    zeros = {name: torch.zeros_like(p) for name, p in block(one).items()}
    plain = tune(one, block(one), examples(), sgd(max_steps=3))
    corrected = tune(other, block(other), examples(), sgd(max_steps=3), correction=zeros)
    assert all(torch.equal(plain.tensors[name], corrected.tensors[name]) for name in zeros)


def test_the_mean_gradient_comes_out_of_the_sum_of_learning_rates(pico):
    """Option II's estimate: (x - y) / lr_sum less the correction is the mean of the clipped gradients."""
    config = sgd(max_steps=3, lr=1e-4, schedule="cosine", warmup_steps=1, clip_norm=0.0)
    model, still = pico("llama"), pico("llama")
    start = {name: p.detach().clone() for name, p in block(model).items()}
    # lr is so small that all gradients are those at the start
    correction = {name: torch.full_like(p, 0.5) for name, p in start.items()}
    result = tune(model, block(model), examples(), config, correction=correction)
    batches = list(make_loader(examples(), 4, pad_id=0, shuffle=True, seed=0))
    more = make_loader(examples(), 4, pad_id=0, shuffle=True, seed=0)
    list(more)
    batches += list(more)[:1]
    rates = [learning_rate(config, step, 3) for step in range(3)]
    mean = {name: torch.zeros_like(p) for name, p in start.items()}
    for rate, batch in zip(rates, batches, strict=True):
        labels = batch.pop("labels")
        logits = still(**batch).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        for name, g in zip(start, torch.autograd.grad(loss, list(block(still).values())), strict=True):
            mean[name] += rate / sum(rates) * g
    assert result.lr_sum == pytest.approx(sum(rates)) == result.metrics["lr-sum"]
    for name, value in start.items():
        estimate = (value.double() - result.tensors[name].double()) / result.lr_sum - 0.5
        # x - y is about 1e-4 and its fp32 rounding about 1e-8, over a sum of rates of about 2e-4
        assert float((estimate - mean[name].double()).abs().max()) < 2e-3


@pytest.mark.parametrize(("optimizer", "mu"), [("sgd", 0.0), ("sgd", 2.0), ("adamw", 2.0)])
def test_how_far_a_constant_gradient_would_have_taken_it(pico, optimizer, mu):
    """FedNova's |a_i|_1: under a constant gradient of -1 and a pull mu, SGD goes lr_k (1 - mu distance) in step k."""
    config = sgd(optimizer=optimizer, proximal_mu=mu, max_steps=5, schedule="linear")
    model = pico("llama")
    result = tune(model, block(model), examples(), config)
    distance = 0.0
    for step in range(5):
        distance += learning_rate(config, step, 5) * (1.0 - mu * distance * (optimizer == "sgd"))
    assert result.lr_sum == pytest.approx(distance)


def test_the_closed_form_under_a_proximal_term(pico):
    model = pico("llama")
    alpha = 0.1 * 2.0  # lr * mu; the paper's (1 - (1 - alpha)^tau) / alpha is in units of lr
    result = tune(model, block(model), examples(), sgd(proximal_mu=2.0, max_steps=3))
    assert result.lr_sum == pytest.approx(0.1 * (1 - (1 - alpha) ** 3) / alpha)


def test_only_the_steps_that_led_to_the_result_count(pico):
    """Where validation chooses an earlier step, the later ones left no trace in the tensors."""
    model = pico("llama")
    ids = [[5, 9] * 5] * 4
    watched = Dataset.from_dict({"input_ids": ids, "labels": ids})  # nothing like what is tuned on
    config = sgd(lr=1.0, max_steps=8, eval_every=1, clip_norm=0.0)
    result = tune(model, block(model), examples(), config, validation=watched)
    assert result.best_step is not None and result.best_step < 8
    assert result.lr_sum == pytest.approx(1.0 * result.best_step)
