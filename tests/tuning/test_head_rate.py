"""The head's own learning rate, and what else tuning a classifier must keep to."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from offsite_fl.config import TuneConfig
from offsite_fl.data.by_task import examples_for
from offsite_fl.data.labels import Classes
from offsite_fl.errors import ConfigError
from offsite_fl.evaluation.classification import class_nll
from offsite_fl.local.scaffold import Scaffold
from offsite_fl.models.blocks import find_blocks
from offsite_fl.models.head import is_head
from offsite_fl.models.plug import adapter_tensors
from offsite_fl.tuning.tune import tune
from tests.pico_classifiers import NAMES, image_folder, labelled_rows, make_classifier, make_image_processor

HEAD = ("classifier.weight", "classifier.bias")
SGD = TuneConfig(optimizer="sgd", lr=0.1, batch_size=9, max_steps=1, clip_norm=0.0, progress=False)


def texts(tokenizer, each=3):
    rows = Dataset.from_list(labelled_rows(each))
    return examples_for("sequence-classification", rows, tokenizer, Classes(NAMES), block_size=16)


def trained(model):
    return adapter_tensors(model, find_blocks(model), (0, 3), HEAD)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_one_step_of_sgd_by_hand(pico_tokenizer, schedule):
    model, examples = make_classifier("bert"), texts(pico_tokenizer)
    parameters = trained(model)
    from offsite_fl.data.loader import make_loader

    (batch,) = make_loader(examples, 9, pad_id=0)
    nats, count = class_nll(model, batch)
    gradients = dict(zip(parameters, torch.autograd.grad(nats / count, list(parameters.values())), strict=True))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    config = TuneConfig(**{**SGD.__dict__, "head_lr_scale": 10.0, "schedule": schedule})
    done = tune(model, parameters, examples, config)
    for name, value in done.tensors.items():
        rate = 1.0 if is_head(name) else 0.1
        torch.testing.assert_close(value, before[name] - rate * gradients[name], rtol=1e-4, atol=1e-6)
    # What FedNova divides by is the adapter's own rate, the same at every site.
    assert (
        done.lr_sum == pytest.approx(0.1) and done.examples == 9 and done.tokens == int(batch["attention_mask"].sum())
    )


def test_a_scale_of_one_changes_nothing(pico_tokenizer):
    results = []
    for scale in (None, 1.0):
        model = make_classifier("bert")
        options = {"max_steps": 3, "optimizer": "adamw", "weight_decay": 0.1}
        config = TuneConfig(**{**SGD.__dict__, **options, **({} if scale is None else {"head_lr_scale": scale})})
        results.append(tune(model, trained(model), texts(pico_tokenizer), config).tensors)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_accumulated_batches_weigh_as_one_large_one(pico_tokenizer):
    results = []
    for size, group in ((9, 1), (4, 3)):
        model = make_classifier("bert")
        config = TuneConfig(**{**SGD.__dict__, "batch_size": size, "gradient_accumulation": group})
        results.append(tune(model, trained(model), texts(pico_tokenizer), config).tensors)
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_rounds_go_on_with_augmented_images_bit_for_bit(tmp_path):
    examples = examples_for(
        "image-classification",
        image_folder(tmp_path / "pets", each=2),
        make_image_processor(),
        Classes(NAMES),
        block_size=2,
    )
    whole = TuneConfig(**{**SGD.__dict__, "batch_size": 2, "max_steps": 5, "schedule_steps": 5, "augment": "crop-flip"})
    one = make_classifier("vit")
    at_once = tune(one, trained(one), examples, whole).tensors
    two = make_classifier("vit")
    for offset, steps in ((0, 2), (2, 3)):
        part = TuneConfig(**{**whole.__dict__, "max_steps": steps, "schedule_offset": offset})
        parts = tune(two, trained(two), examples, part).tensors
    assert all(torch.equal(at_once[name], parts[name]) for name in at_once)


def test_scaffold_refuses_a_head_with_another_rate():
    Scaffold().check(SGD)
    with pytest.raises(ConfigError, match="head-lr-scale = 10"):
        Scaffold().check(TuneConfig(**{**SGD.__dict__, "head_lr_scale": 10.0}))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_the_scale_is_a_number_above_zero(scale):
    with pytest.raises(ConfigError, match="head-lr-scale"):
        TuneConfig(head_lr_scale=scale)
