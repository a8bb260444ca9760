"""Tasks are told by a model's class or by the architectures of its config."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LlamaForCausalLM,
)
from transformers import PretrainedConfig as Config

from offsite_fl.errors import ModelError
from offsite_fl.models.tasks import build_model, check_task, classes_for, need_next_token, task_of, task_of_config

from .families import FAMILIES, build


@pytest.mark.parametrize("name", ["llama2", "t5", "bert", "vit", "clip_vision", "llava"])
def test_a_models_task_is_that_of_its_class(name: str) -> None:
    assert task_of(build(name)) == FAMILIES[name].task


def test_subclasses_and_strangers(pico_llama: nn.Module) -> None:
    class Mine(LlamaForCausalLM):
        pass

    with torch.device("meta"):
        mine = Mine(pico_llama.config)  # type: ignore[arg-type]
    assert task_of(mine) == "causal-lm"
    assert task_of(nn.Linear(2, 2)) is None


def test_a_configs_task_is_what_its_architecture_says() -> None:
    config = BertConfig()
    assert task_of_config(config) == "causal-lm"  # the first that knows BERT
    for name, task in (("BertForMaskedLM", "masked-lm"), ("BertModel", "features")):
        config.architectures = [name]
        assert task_of_config(config) == task

    class Stranger(Config):  # type: ignore[misc,unused-ignore]
        model_type = "stranger"

    with pytest.raises(ModelError, match=r"Stranger under any of the tasks causal-lm, .*must be registered"):
        task_of_config(Stranger())


def test_of_several_classes_the_named_one_is_built() -> None:
    config = DeiTConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, image_size=8, patch_size=4)
    assert len(classes_for("image-classification", DeiTConfig)) > 1
    with torch.device("meta"):
        assert type(build_model("image-classification", config)).__name__ == "DeiTForImageClassification"
        config.architectures = ["DeiTForImageClassificationWithTeacher"]
        assert isinstance(build_model("image-classification", config), DeiTForImageClassificationWithTeacher)


def test_the_next_token_loss(pico_llama: nn.Module) -> None:
    need_next_token(pico_llama)
    need_next_token(nn.Linear(2, 2))
    with torch.device("meta"):
        bert = BertForMaskedLM(BertConfig(num_hidden_layers=1))
    with pytest.raises(ModelError, match="BertForMaskedLM is a model for masked-lm: it has no next-token loss"):
        need_next_token(bert)


def test_unknown_tasks() -> None:
    assert check_task("masked-lm") == "masked-lm"
    with pytest.raises(ModelError, match="unknown task 'mask-lm'; did you mean 'masked-lm'"):
        check_task("mask-lm")
