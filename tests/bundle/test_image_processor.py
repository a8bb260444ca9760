"""Bundles of image classifiers: format 2, an image processor of transformers' own, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from offsite_fl.bundle import Bundle, open_bundle
from offsite_fl.bundle.limits import Limits
from offsite_fl.errors import BundleError, ModelError
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner
from tests.conftest import make_tokenizer
from tests.pico_classifiers import make_classifier, make_image_processor

from .conftest import refused, state_of, write_manifest

CONFIG = "processor/preprocessor_config.json"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    processor = make_image_processor()
    processor.name_or_path = "/home/owner/model"
    owner = ModelOwner(make_classifier("vit"), processor, Split(first=1, last=1))
    return owner.make_bundle("layer-drop:keep=2", tmp_path_factory.mktemp("vit") / "bundle")


def forged(
    bundle: Bundle, folder: Path, edit: Callable[[dict[str, Any]], object] = lambda config: None, **manifest: Any
) -> Path:
    """The bundle with another processor configuration, its hashes right again."""
    shutil.copytree(bundle.path, folder)
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))
    raw = json.loads((folder / "manifest.json").read_bytes()) | manifest
    data = (folder / CONFIG).read_bytes()
    for entry in raw["files"]:
        if entry["file"] == CONFIG:
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(folder, raw)
    return folder


def test_layout_and_format(bundle):
    files = {name for name in state_of(bundle.path) if not name.startswith("shards/")}
    assert files == {"manifest.json", CONFIG} and bundle.manifest.format_version == 2
    head = {name for name in bundle.tensors() if name.startswith("adapter.head.")}
    assert head == {"adapter.head.classifier.weight", "adapter.head.classifier.bias"}
    assert "/home" not in (bundle.path / CONFIG).read_text()


def test_the_processor_makes_the_same_pixels(bundle):
    image = Image.radial_gradient("L").convert("RGB")
    ours, theirs = (p(image, return_tensors="pt")["pixel_values"] for p in (make_image_processor(), bundle.processor()))
    assert torch.equal(ours, theirs)
    with pytest.raises(ModelError, match="prepares images"):
        bundle.tokenizer()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c.update(auto_map={"AutoImageProcessor": "evil.Evil"}), "auto_map"),
        (lambda c: c.update(vocab_file="/etc/passwd"), "points to other files"),
        (lambda c: c.update(image_processor_type="EvilProcessor"), "no image processor of transformers"),
        (lambda c: c.pop("image_processor_type"), "no image processor of transformers"),
        (lambda c: c.update(image_processor_type=["ViTImageProcessor"]), "no image processor of transformers"),
        (lambda c: c.update(size={"height": 10**9, "width": 8}), "limit is 4096"),
        (lambda c: c.update(crop_size=1e12), "limit is 4096"),
        (lambda c: c.update(size=[10**9, 8]), "limit is 4096"),
        (lambda c: c.update(image_processor_type="Qwen2VLImageProcessor", min_pixels=10**12), "limit is 4096"),
        (lambda c: c.update(image_processor_type="ConvNextImageProcessor", crop_pct=1e-6), r"limit is 0\.004096"),
        (lambda c: c.update(pad_size={"height": float("nan"), "width": 1}), "limit is 4096"),
        (
            lambda c: c.update(max_patches=4096, size={"height": 2048, "width": 64}),
            r"4096 patches .* 4096 x 4096 pixels in all",
        ),
    ],
)
def test_forged_processors_are_refused(bundle, tmp_path, edit, said):
    refused(forged(bundle, tmp_path / "forged", edit), said)


@pytest.mark.parametrize(("patches", "side"), [(12, 384), (256, 16)])
def test_patches_of_moderate_size_pass(bundle, tmp_path, patches, side):
    """GotOcr2 cuts an image into 12 patches of 384 x 384, SigLIP 2 into 256 of 16 x 16."""
    size = {"height": side, "width": side}
    open_bundle(forged(bundle, tmp_path / "forged", lambda c: c.update(max_patches=patches, size=size)))


def test_the_limit_on_sides_is_the_sites_own(bundle):
    with pytest.raises(BundleError, match="limit is 7"):
        open_bundle(bundle.path, limits=Limits(max_image_side=7))


def test_an_old_format_has_neither_head_nor_images(bundle, tmp_path):
    refused(forged(bundle, tmp_path / "forged", format_version=1), "format 1")


def test_a_tokenizer_in_its_place_or_beside_it_is_refused(bundle, tmp_path):
    folder = forged(bundle, tmp_path / "forged")
    raw = json.loads((folder / "manifest.json").read_bytes())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    extra = {"file": "tokenizer/tokenizer_config.json", "bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    write_manifest(folder, raw | {"files": [*raw["files"], extra]})
    refused(folder, "only file beside the shards")
    (folder / CONFIG).unlink()
    (folder / "processor").rmdir()
    write_manifest(folder, raw | {"files": [extra]})
    refused(folder, "need an image processor")


def test_text_bundles_keep_format_1_and_those_with_a_head_have_2(tmp_path):
    for head, form in (("none", 1), ("auto", 2)):
        owner = ModelOwner(make_classifier("bert"), make_tokenizer(), Split(first=1, last=1), head=head)
        made = owner.make_bundle("layer-drop:keep=2", tmp_path / head)
        assert made.manifest.format_version == form and (CONFIG not in state_of(made.path))
        assert open_bundle(made.path).plan.head == (() if head == "none" else ("classifier.weight", "classifier.bias"))


def test_a_foreign_processor_class_does_not_leave(tmp_path):
    class Own(type(make_image_processor())):  # type: ignore[misc]
        pass

    owner = ModelOwner(make_classifier("vit"), Own(size={"height": 8, "width": 8}), Split(first=1, last=1))
    with pytest.raises(BundleError, match="Own is no image processor of transformers"):
        owner.make_bundle("layer-drop:keep=2", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
