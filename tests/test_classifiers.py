"""Classifiers end to end with the two parties (fault 6: nobody ran the vision path): bundle, tuning, plug-in, rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from offsite_fl.config import TuneConfig
from offsite_fl.data.loader import make_loader
from offsite_fl.data_owner import DataOwner
from offsite_fl.emulators.backward import BackwardPass
from offsite_fl.emulators.gradients import full_gradients
from offsite_fl.errors import BundleError, DataError, ModelError, UpdateError
from offsite_fl.evaluation.classification import predictions
from offsite_fl.measure import Measure
from offsite_fl.models.head import HEAD, is_head
from offsite_fl.models.plug import adapter_tensors
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from offsite_fl.update import Update
from tests.conftest import make_tokenizer
from tests.pico_classifiers import image_folder, labelled_rows, make_classifier, make_image_processor

TUNE = TuneConfig(max_steps=25, lr=2e-3, head_lr_scale=5.0, batch_size=6, block_size=16, progress=False, device="cpu")
ENDS = Split(first=1, last=1)
KINDS = ["vit", "dinov2", "bert", "roberta", "distilbert", "llama"]


def make_owner(kind: str) -> ModelOwner:
    processor = make_image_processor() if kind in ("vit", "dinov2") else make_tokenizer()
    return ModelOwner(make_classifier(kind), processor, ENDS)


def data(kind: str, folder: Path, each: int = 4, seed: int = 0) -> Any:
    if kind in ("vit", "dinov2"):
        return image_folder(folder, each, seed)
    return Dataset.from_list(labelled_rows(each, seed))


@torch.no_grad()
def logits(model, examples, pad_id=0):
    return predictions(model, make_loader(examples, 4, pad_id=pad_id))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, tmp_path):
    owner = make_owner(kind)
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    train, test = data(kind, tmp_path / "train"), data(kind, tmp_path / "test", seed=5)
    site = DataOwner.open(bundle.path, "float32", "cpu")
    assert site.classes == owner.classes and type(site.processor) is type(owner.processor)
    examples = site.examples(test, 16)
    torch.testing.assert_close(logits(site.model, examples), logits(owner.emulated(), examples))
    before = {name: t.clone() for name, t in owner.model.state_dict().items()}
    shared = {n: p.detach().clone() for n, p in site.model.named_parameters() if not p.requires_grad}
    update = site.tune(train, TUNE)
    # Nothing but adapter and head was trained, and both are in the file.
    assert all(torch.equal(p, shared[n]) for n, p in site.model.named_parameters() if n in shared)
    update = Update.load(update.save(tmp_path / "update.safetensors"))
    heads = {name for name in update.tensors if name.startswith("adapter.head.")}
    assert {name.removeprefix("adapter.head.") for name in heads} == set(owner.head)
    measure = Measure(owner, test, block_size=16, device="cpu")
    zero, tuned, plugged = (
        measure.full_zero_shot(),
        measure.emulator_tuned(update.tensors),
        measure.plug_in(update.tensors),
    )
    assert all(torch.equal(t, before[name]) for name, t in owner.model.state_dict().items())
    assert tuned.accuracy > 0.8 and plugged.accuracy > 0.6 and tuned.f1 > 0.8
    assert zero.f1 is not None and measure.examples == 12
    owner.plug_in(update)
    changed = {name for name, t in owner.model.state_dict().items() if not torch.equal(t, before[name])}
    inside = {f"{owner.blocks.path}.{i}." for i in owner.adapter_indices}
    assert changed >= set(owner.head)
    assert all(name in owner.head or any(name.startswith(p) for p in inside) for name in changed)
    assert measure.full_zero_shot() == plugged


def test_texts_are_filled_up_with_what_the_model_takes_for_padding(tmp_path):
    """A decoder classifies the state at its last token that isn't padding, and knows padding by its config's id."""
    tokenizer, model = make_tokenizer(), make_classifier("llama", pad_token_id=1)
    assert tokenizer.pad_token_id != 1
    owner = ModelOwner(model, tokenizer, ENDS)
    site = DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle"), "float32", "cpu")
    rows = Dataset.from_dict({"text": ["ab", "abcdefgh"], "label": [0, 1]})
    measure = Measure(owner, rows, block_size=16, device="cpu")
    assert owner.pad_id == site.pad_id == 1
    (batch,) = measure.batches
    alone = model(input_ids=batch["input_ids"][:1, :2]).logits
    torch.testing.assert_close(model(**batch).logits[:1], alone)


def test_a_decoder_without_a_padding_token_is_refused_before_any_work_and_an_encoder_is_not():
    model, tokenizer = make_classifier("llama", pad_token_id=None), make_tokenizer()
    with pytest.raises(ModelError, match=r"several texts at once.*Set pad_token_id in its config"):
        ModelOwner(model, tokenizer, ENDS)
    model.config.pad_token_id = tokenizer.pad_token_id
    assert ModelOwner(model, tokenizer, ENDS).pad_id == tokenizer.pad_token_id
    ModelOwner(make_classifier("bert", pad_token_id=None), tokenizer, ENDS)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_saved_model_is_an_ordinary_classifier(kind, tmp_path):
    owner = make_owner(kind)
    owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    examples = owner.examples(data(kind, tmp_path / "data"), 16)
    want = logits(owner.model, examples)
    again = ModelOwner.from_pretrained(owner.save(tmp_path / "out"), ENDS, device="cpu")
    assert again.head == owner.head and again.task == owner.task
    torch.testing.assert_close(logits(again.model, again.examples(data(kind, tmp_path / "more"), 16)), want)
    assert again.use_bundle(tmp_path / "bundle").digest == owner.bundle.digest


def test_full_fine_tuning_gives_the_head_its_own_rate(tmp_path, monkeypatch):
    owner = make_owner("bert")
    owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    rows = data("bert", tmp_path)
    measure = Measure(owner, rows, block_size=16, device="cpu")
    seen = {}

    def noted(model, trainable, *args, **kwargs):
        seen.update(
            {name: model.get_parameter(name.removeprefix("adapter.head.")) is p for name, p in trainable.items()}
        )

    monkeypatch.setattr("offsite_fl.measure.tune", noted)
    measure.full_fine_tuning([rows, rows], TUNE)
    assert all(seen.values()) and len(seen) == len(list(owner.model.parameters()))
    assert {name for name in seen if name.startswith("adapter.head.")} == {
        f"adapter.head.{path}" for path in owner.head
    }


def test_zero_shot_is_the_nearest_class_mean(tmp_path):
    owner = make_owner("vit")
    public, test = image_folder(tmp_path / "public", 3, seed=7), image_folder(tmp_path / "test", 8, seed=8)
    owner.set_nearest_mean_head(public)
    bundle = owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    handed_out = owner.initial_state()["adapter.head.classifier.weight"]
    assert torch.equal(handed_out, owner.model.classifier.weight)
    assert torch.equal(handed_out, bundle.tensors()["adapter.head.classifier.weight"])
    measure = Measure(owner, test, device="cpu")
    assert measure.full_zero_shot().accuracy > 0.8
    with pytest.raises(UpdateError, match="before make_bundle"):
        owner.set_nearest_mean_head(public)
    with pytest.raises(DataError, match="no column 'labels'"):
        make_owner("vit").set_nearest_mean_head(owner.examples(public, 16, labelled=False))
    # Whoever opens the model's files again has their head, and takes the one that was handed out.
    again = ModelOwner(make_classifier("vit"), make_image_processor(), ENDS)
    again.use_bundle(bundle.path)
    assert not torch.equal(again.model.classifier.weight, handed_out)
    again.take_handed_out_head()
    assert torch.equal(again.model.classifier.weight, handed_out)


def test_a_head_is_trained_whole_beside_lora_factors(tmp_path):
    owner, rows = make_owner("bert"), data("bert", tmp_path)
    site = DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle"), "float32", "cpu")
    before = {name: t.clone() for name, t in site.model.state_dict().items()}
    config = replace(TUNE, lora_rank=2, lora_alpha=6.0)
    update = Update.load(site.tune(rows, config).save(tmp_path / "update.safetensors"))
    assert all(torch.equal(t, before[name]) for name, t in site.model.state_dict().items())
    heads = {HEAD + path for path in owner.head}
    factors = update.tensors.keys() - heads
    assert heads < update.tensors.keys() and all(
        name.endswith((".lora_A.weight", ".lora_B.weight")) for name in factors
    )
    handed_out = owner.adapter()
    owner.plug_in(update)
    for name, value in owner.adapter().items():
        linear = name.removesuffix(".weight")
        wanted = update.tensors.get(name, handed_out[name])
        if linear + ".lora_A.weight" in factors:
            wanted = wanted + 3 * update.tensors[linear + ".lora_B.weight"] @ update.tensors[linear + ".lora_A.weight"]
        torch.testing.assert_close(value, wanted)
        assert name not in heads or not torch.equal(value, handed_out[name])


def test_lora_without_a_head_leaves_the_classifier_alone(tmp_path):
    frozen = ModelOwner(make_classifier("bert"), make_tokenizer(), ENDS, head="none")
    site = DataOwner.open(frozen.make_bundle("layer-drop:keep=2", tmp_path / "none"), "float32", "cpu")
    update = site.tune(data("bert", tmp_path), replace(TUNE, lora_rank=2, max_steps=1))
    before = frozen.model.classifier.weight.clone()
    frozen.plug_in(update)
    assert torch.equal(frozen.model.classifier.weight, before)
    assert not [name for name in update.tensors if is_head(name)]


def test_an_update_of_factors_without_its_head_changes_nothing(tmp_path):
    owner = make_owner("bert")
    site = DataOwner.open(owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle"), "float32", "cpu")
    update = site.tune(data("bert", tmp_path), replace(TUNE, lora_rank=2, max_steps=1))
    before = owner.adapter()
    lost = {name: tensor for name, tensor in update.tensors.items() if not is_head(name)}
    with pytest.raises(UpdateError, match=r"adapter\.head\.classifier"):
        owner.plug_in(replace(update, tensors=lost))
    with pytest.raises(UpdateError, match=r"missing tensor of the head 'adapter\.head\.classifier"):
        site.lora(update.lora, factors=lost)
    assert all(torch.equal(value, before[name]) for name, value in owner.adapter().items())


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ModelError, match="needs an image processor"):
        ModelOwner(make_classifier("vit"), make_tokenizer(), ENDS)
    with pytest.raises(ModelError, match="needs a tokenizer"):
        ModelOwner(make_classifier("bert"), make_image_processor(), ENDS)
    owner = make_owner("vit")
    with pytest.raises(ModelError, match="no tokenizer"):
        _ = owner.tokenizer
    bundle = make_owner("bert").make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    other = ModelOwner(make_classifier("bert"), make_tokenizer(), ENDS, head="none")
    with pytest.raises(BundleError, match="made with head"):
        other.use_bundle(bundle.path)


@pytest.mark.parametrize(
    "emulator",
    [
        "low-rank:keep=0.5",
        "quantize:bits=8",
        "smooth",
        "crash:keep=2",
        "prune:keep=0.5",
        "layer-drop:keep=2+low-rank:keep=0.5",
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_emulators_work_with_calibration_images(emulator, labelled, tmp_path):
    owner = make_owner("vit")
    folder = image_folder(tmp_path / "public", 4)
    bundle = owner.make_bundle(emulator, tmp_path / "bundle", calibration=folder if labelled else folder / "cat")
    assert owner.report is not None and owner.report.hidden_error is not None and owner.report.hidden_error >= 0
    site = DataOwner.open(bundle, "float32", "cpu")
    assert logits(site.model, site.examples(folder, 16)).isfinite().all()


def test_the_repair_covers_the_head(tmp_path):
    owner = make_owner("bert")
    owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    rows = data("bert", tmp_path)
    repair = owner.measure_repair(rows, TuneConfig(**{**TUNE.__dict__, "max_steps": 2}))
    assert repair.tensors.keys() == owner.initial_state().keys()


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_gradients_of_the_full_model_are_those_of_the_class_loss(kind, tmp_path):
    owner = make_owner(kind)
    context = owner.context(data(kind, tmp_path / "public"), block_size=16)
    batches = list(context.calibration)
    found = full_gradients(context, batches)
    assert not [name for name in found if is_head(name)]
    count = sum(len(batch["labels"]) for batch in batches)
    total = sum(owner.model(**batch).loss * len(batch["labels"]) / count for batch in batches)
    live = adapter_tensors(owner.model, owner.blocks, owner.adapter_indices)
    for name, gradient in zip(live, torch.autograd.grad(total, list(live.values()), allow_unused=True), strict=True):
        torch.testing.assert_close(
            found[name], torch.zeros_like(found[name]) if gradient is None else gradient, rtol=1e-4, atol=1e-6
        )
    back = BackwardPass(context, batches, "test")
    assert back.tokens == count and back.loss == pytest.approx(float(total.detach()), rel=1e-5)


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize(
    "emulator", ["gradot:keep=0.6", "gradient-match:keep=2", "distill:steps=2", "distill:steps=2,w-grad=1.0"]
)
def test_emulators_that_need_a_gradient_need_labels(kind, emulator, tmp_path):
    owner = make_owner(kind)
    public = data(kind, tmp_path / "public", 6)
    owner.make_bundle(emulator, tmp_path / "bundle", calibration=public, block_size=16)
    bare = public / "cat" if kind == "vit" else public.remove_columns("label")
    with pytest.raises(DataError, match="give labelled examples"):
        owner.make_bundle(emulator, tmp_path / "other", calibration=bare, block_size=16)


def test_loss_margin_is_for_text_that_is_predicted(tmp_path):
    with pytest.raises(ModelError, match="no next-token loss"):
        make_owner("bert").make_bundle(
            "loss-margin:steps=2", tmp_path / "bundle", calibration=data("bert", tmp_path), block_size=16
        )
