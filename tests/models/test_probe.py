"""The smallest batch: what the forward pass of each kind of model takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from offsite_fl.models.probe import probe_batch
from offsite_fl.models.tasks import build_model

from .families import build


@pytest.mark.parametrize("name", ["bert", "t5", "vit", "llava"])
def test_the_model_takes_it(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        model(**probe_batch(model, length=5, rows=2))


def test_shapes_by_hand() -> None:
    assert {n: tuple(t.shape) for n, t in probe_batch(build("vit"), rows=2).items()} == {"pixel_values": (2, 3, 16, 16)}
    both = probe_batch(build("t5"), length=3)
    assert both["input_ids"].tolist() == [[0, 1, 2]] and both["decoder_input_ids"].tolist() == [[0, 0, 0]]
    plain = probe_batch(nn.Linear(2, 2))
    assert plain["input_ids"].tolist() == [[0, 0, 0, 0]] and len(plain) == 1


def test_a_size_that_no_config_says_is_that_of_the_patches() -> None:
    model: Any = nn.Module()
    model.main_input_name, model.patches = "pixel_values", nn.Linear(2, 2)
    assert probe_batch(model)["pixel_values"].shape == (1, 3, 224, 224)
    model.patches.img_size = (16, 24)
    assert probe_batch(model)["pixel_values"].shape == (1, 3, 16, 24)


def test_sound() -> None:
    from transformers import WhisperConfig

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(vocab_size=64, pad_token_id=0, num_mel_bins=8, max_source_positions=10, **sizes, **heads)
    model = build_model("speech-seq2seq", config).eval()
    batch = probe_batch(model)
    assert tuple(batch["input_features"].shape) == (1, 8, 20)  # two frames a position, for the convolution halves them
    with torch.no_grad():
        model(**batch)
