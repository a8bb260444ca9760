"""Pico classifiers, image processors and labelled data for tests of classification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from offsite_fl.models.tasks import build_model
from tests.conftest import VOCAB

NAMES = ("cat", "dog", "owl")
SIDE = 8
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 5,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("image-classification", _SIZES | {"image_size": SIDE, "patch_size": 4}),
    "dinov2": ("image-classification", _SIZES | {"image_size": SIDE, "patch_size": 4}),
    "bert": ("sequence-classification", _SIZES | {"vocab_size": VOCAB, "max_position_embeddings": 64}),
    "roberta": ("sequence-classification", _SIZES | {"vocab_size": VOCAB, "max_position_embeddings": 64}),
    "distilbert": (
        "sequence-classification",
        {"n_layers": 5, "dim": 16, "hidden_dim": 24, "n_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64},
    ),
    "llama": ("sequence-classification", _SIZES | {"num_key_value_heads": 2, "vocab_size": VOCAB}),
}


def make_classifier(kind: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A classifier of 5 blocks, hidden 16, and three classes; no dropout, every parameter random."""
    task, settings = KINDS[kind]
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    quiet = {"pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout": 0.0}
    quiet |= {"attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    config = AutoConfig.for_model(kind, **(quiet | settings | labels | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(task, config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def make_image_processor() -> ViTImageProcessorPil:
    """Resizes to 8 x 8 and maps pixels to [-1, 1]."""
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def picture(label: int, draw: np.random.Generator, width: int = 9, height: int = 7) -> Image.Image:
    """A noisy image in the colour of its class: red, green or blue."""
    pixels = draw.normal(60, 20, (height, width, 3))
    pixels[..., label] += 120
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def image_folder(folder: Path, each: int = 4, seed: int = 0) -> Path:
    """``folder/<class>/<n>.png`` with ``each`` pictures a class."""
    draw = np.random.default_rng(seed)
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            picture(label, draw).save(folder / name / f"{number}.png")
    return folder


def labelled_rows(each: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that mostly hold one letter: a for cats, m for dogs, z for owls."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(each):
        for name, letter in zip(NAMES, "amz", strict=True):
            text = "".join(letter if draw.random() < 0.8 else "e" for _ in range(int(draw.integers(6, 12))))
            rows.append({"text": text, "label": name})
    return rows
