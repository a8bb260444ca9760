"""A model is told to keep no cache where it may have one, and isn't told where it takes no such argument."""

from __future__ import annotations

import pytest
from torch import nn

from offsite_fl.emulators import start
from offsite_fl.emulators.report import planned_network
from offsite_fl.models.caching import no_cache
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner

from .families import FAMILIES, batch_for, build, processor_of


@pytest.mark.parametrize("name", ["llama3", "t5", "bert", "llava"])
def test_texts(name: str) -> None:
    model = build(name)
    assert no_cache(model) == {"use_cache": False}
    assert getattr(model(**batch_for(name), **no_cache(model)), "past_key_values", None) is None


def test_images_and_what_is_no_model_of_transformers() -> None:
    assert no_cache(build("vit")) == {}
    assert no_cache(nn.Linear(2, 2)) == {"use_cache": False}


def test_the_network_of_a_client_is_told_neither() -> None:
    owner = ModelOwner(build("vit"), processor_of(FAMILIES["vit"]), Split(first=1, last=1))
    context = owner.context()
    assert no_cache(planned_network(start(context), context)[0]) == {}
