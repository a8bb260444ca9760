"""The nearest-class-mean head: its answers are those of distances worked out one by one."""

from __future__ import annotations

import pytest
import torch

from offsite_fl.data.by_task import examples_for
from offsite_fl.data.labels import Classes
from offsite_fl.data.loader import make_loader
from offsite_fl.errors import DataError, ModelError
from offsite_fl.evaluation.classification import predictions
from offsite_fl.heads import nearest_class_mean_head
from tests.pico_classifiers import NAMES, image_folder, labelled_rows, make_classifier, make_image_processor

HEAD = ("classifier.weight", "classifier.bias")


def images(folder, each=4, seed=0):
    made = examples_for(
        "image-classification", image_folder(folder, each, seed), make_image_processor(), Classes(NAMES), block_size=2
    )
    return list(make_loader(made, 5, pad_id=0))


@torch.no_grad()
def features(model, batches):
    """What enters the classifier, by taking it away."""
    own, model.classifier = model.classifier, torch.nn.Identity()
    try:
        return torch.cat([model(pixel_values=batch["pixel_values"]).logits for batch in batches]).double()
    finally:
        model.classifier = own


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_answers_are_the_nearest_means(tmp_path, kind):
    model = make_classifier(kind)
    public, test = images(tmp_path / "public"), images(tmp_path / "test", seed=9)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, y = features(model, public), torch.cat([batch["labels"] for batch in public])
    nearest_class_mean_head(model, public, HEAD)
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == set(HEAD)
    means = [x[y == k].mean(0) for k in range(3)]
    own = sum(float((row - means[k]).square().sum()) for row, k in zip(x, y.tolist(), strict=True)) / (12 - 3)
    apart = sum(float((a - b).square().sum()) for a in means for b in means) / 6
    own = max(own, apart / 8)
    logits, _ = predictions(model, test)
    for row, given in zip(features(model, test), logits, strict=True):
        distances = torch.stack([(row - mean).square().sum() for mean in means])
        assert int(given.argmax()) == int(distances.argmin())
        # one nat for each mean squared distance to the own mean
        torch.testing.assert_close(given - given[0], (-(distances - distances[0]) / own).float(), rtol=1e-3, atol=1e-3)


def test_a_scale_may_be_given_and_one_example_each_is_enough(tmp_path):
    public = images(tmp_path / "public", each=1)
    model = make_classifier("vit")
    nearest_class_mean_head(model, public, HEAD, scale=0.5)
    x = features(model, public)
    torch.testing.assert_close(model.classifier.weight.double(), x, rtol=1e-5, atol=1e-5)
    nearest_class_mean_head(model, public, HEAD)
    apart = torch.stack([(x[i] - x[j]).square().sum() for i, j in ((0, 1), (0, 2), (1, 2))]).mean()
    torch.testing.assert_close(model.classifier.weight.double(), 2 * x * 8 / apart, rtol=1e-5, atol=1e-5)
    # so the mean gap between the logits at two means is 8 nats
    logits = model(**{"pixel_values": torch.cat([b["pixel_values"] for b in public])}).logits
    gaps = [float(logits[i, i] - logits[i, j]) for i in range(3) for j in range(3) if i != j]
    assert sum(gaps) / 6 == pytest.approx(8, rel=1e-3)


def test_what_can_not_be(tmp_path, pico_tokenizer):
    model = make_classifier("vit")
    batches = images(tmp_path / "public", each=2)
    some = [{name: value[:3] for name, value in batches[0].items()}]
    with pytest.raises(DataError, match="class 'owl'"):
        nearest_class_mean_head(model, some, HEAD)
    with pytest.raises(DataError, match="no example"):
        nearest_class_mean_head(model, [], HEAD)
    with pytest.raises(ModelError, match="single linear"):
        nearest_class_mean_head(model, batches, ())
    same = [{"pixel_values": torch.zeros(3, 3, 8, 8), "labels": torch.arange(3)}]
    with pytest.raises(DataError, match="the same"):
        nearest_class_mean_head(model, same, HEAD)
    from datasets import Dataset

    rows = examples_for(
        "sequence-classification", Dataset.from_list(labelled_rows(1)), pico_tokenizer, Classes(NAMES), block_size=8
    )
    with pytest.raises(ModelError, match="no bias"):
        nearest_class_mean_head(make_classifier("llama"), list(make_loader(rows, 3, pad_id=0)), ("score.weight",))
