"""Which emulators there can be of a model is told before any is built, and told right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from offsite_fl.emulators import describe_emulators
from offsite_fl.emulators.applies import BY_LINEARS, BY_LOSS, BY_NEXT_TOKEN, why_not
from offsite_fl.emulators.streams import batch_length, first_examples, merged
from offsite_fl.models.blocks import find_blocks
from tests.models.families import build

NAMES = {method.name for method in describe_emulators()}


def test_the_tables_name_what_there_is() -> None:
    assert BY_LOSS | BY_LINEARS <= NAMES and BY_NEXT_TOKEN <= BY_LOSS


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_language_model_has_all_and_others_those_that_their_loss_allows(name: str) -> None:
    llama = build("llama2")
    assert why_not(name, llama, find_blocks(llama)) is None
    for family, task, refused in (
        ("bert", "sequence-classification", BY_NEXT_TOKEN),
        ("vit", "image-classification", BY_NEXT_TOKEN),
        ("t5", "seq2seq-lm", BY_LOSS),
    ):
        model = build(family)
        reason = why_not(name, model, find_blocks(model))
        assert (reason is None) == (name not in refused)
        assert reason is None or task in reason


def test_blocks_without_a_linear() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Embedding(2, 2), nn.Embedding(2, 2)

    model = nn.Module()
    model.layers = nn.ModuleList([Block(), Block()])
    assert why_not("quantize", model, find_blocks(model)) == "no Block holds a dense linear layer"
    assert why_not("layer-drop", model, find_blocks(model)) is None


def test_batches_of_images_and_of_two_texts() -> None:
    images = [{"pixel_values": torch.zeros(4, 3, 8, 8)} for _ in range(3)]
    assert [len(batch["pixel_values"]) for batch in merged(images, tokens=8 * 256)] == [8, 4]
    assert [len(batch["pixel_values"]) for batch in first_examples(images, 6 * 256)] == [4, 2]
    both = {"input_ids": torch.zeros(2, 9), "decoder_input_ids": torch.zeros(2, 5)}
    other = {"input_ids": torch.zeros(2, 7), "decoder_input_ids": torch.zeros(2, 5)}
    assert batch_length(both) == 5
    assert len(merged([both, both, other])) == 2  # of another length in the encoder: not to be put together
