"""What a model is for, as a closed table: each task is one of transformers' Auto classes, and there are no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    PretrainedConfig,
)

from offsite_fl.errors import ModelError
from offsite_fl.registry import near

# In the order in which a class that stands in several of transformers' tables is looked for.
TASKS: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "image-text-to-text": AutoModelForImageTextToText,
    "speech-seq2seq": AutoModelForSpeechSeq2Seq,
    "masked-lm": AutoModelForMaskedLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "question-answering": AutoModelForQuestionAnswering,
    "image-classification": AutoModelForImageClassification,
    "features": AutoModel,
}
# Tuning and evaluation know two losses: that of the next token, and that of the class of a whole example.
NEXT_TOKEN = ("causal-lm", "image-text-to-text")
CLASSIFICATION = ("sequence-classification", "image-classification")


def task_of(model: nn.Module) -> str | None:
    """The task whose Auto class builds the class of ``model`` from its config; None if there is none.

    A subclass counts as what it derives from. Wrapped models have no task: their own class is asked for.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    for cls in type(model).__mro__:
        for task in TASKS:
            if cls in classes_for(task, type(config)):
                return task
    return None


def need_next_token(model: nn.Module) -> None:
    """``ModelError`` if ``model`` is one whose logits aren't about the next token; unknown classes pass."""
    _need(model, NEXT_TOKEN, "no next-token loss, which is")


def need_classes(model: nn.Module) -> None:
    """``ModelError`` if ``model`` is one that doesn't tell a class for each example; unknown classes pass."""
    _need(model, CLASSIFICATION, "no classes, which are")


def need_loss(model: nn.Module) -> None:
    """``ModelError`` if ``model`` is one for a task whose loss isn't known here; unknown classes pass."""
    _need(model, (*NEXT_TOKEN, *CLASSIFICATION), "no next-token loss and no classes, one of which is")


def _need(model: nn.Module, tasks: Sequence[str], lacking: str) -> None:
    task = task_of(model)
    if task is not None and task not in tasks:
        raise ModelError(
            f"{type(model).__name__} is a model for {task}: it has {lacking} needed here and which only models for "
            f"{' and '.join(tasks)} have"
        )


def task_of_config(config: PretrainedConfig) -> str:
    """The task of the class that ``config.architectures`` names, else the first task that knows the config.

    ``ModelError`` if no task does.
    """
    names = set(getattr(config, "architectures", None) or ())
    known = [task for task in TASKS if classes_for(task, type(config))]
    for task in known:
        if any(cls.__name__ in names for cls in classes_for(task, type(config))):
            return task
    if not known:
        raise ModelError(
            f"transformers has no model for config {type(config).__name__} under any of the tasks {', '.join(TASKS)}; "
            "a class of your own must be registered with AutoConfig and its Auto class in this process"
        )
    return known[0]


def classes_for(task: str, config_class: type[PretrainedConfig]) -> tuple[type, ...]:
    """The classes that the Auto class of ``task`` builds from such a config: none, one, or a few to choose from."""
    try:
        found = TASKS[task]._model_mapping[config_class]
    except (KeyError, ImportError, AttributeError, ValueError):  # not in the table, or a backend isn't installed
        return ()
    return tuple(cls for cls in (found if isinstance(found, (list, tuple)) else (found,)) if isinstance(cls, type))


def check_task(task: str) -> str:
    """Return ``task``, or ``ModelError`` with the nearest name that exists."""
    if task not in TASKS:
        raise ModelError(f"unknown task {task!r}; {near(task, TASKS)}")
    return task


def build_model(task: str, config: PretrainedConfig) -> nn.Module:
    """A fresh model of ``config`` by the Auto class of ``task``; no code but transformers' own or registered runs."""
    choices = classes_for(task, type(config))
    if len(choices) > 1 and not getattr(config, "architectures", None):
        config.architectures = [choices[0].__name__]
    model: nn.Module = TASKS[task].from_config(config, trust_remote_code=False)
    return model
