"""What turns a data owner's files into a model's inputs: a tokenizer, or the image processor of a vision model."""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto import image_processing_auto

from offsite_fl.errors import ModelError

Processor: TypeAlias = PreTrainedTokenizerBase | BaseImageProcessor
TYPE_KEY = "image_processor_type"
IMAGE_TASKS = ("image-classification",)
_BACKENDS = ("Pil", "Fast")


def open_processor(source: str, task: str, **options: Any) -> Processor:
    """The processor in a folder or under a hub id, for models of ``task``; no code from there runs.

    Image processors are those that work on PIL and NumPy, at every party: another backend resizes to other numbers.
    Whatever transformers throws is left to the caller.
    """
    if task in IMAGE_TASKS:
        auto: Any = AutoImageProcessor
        found = auto.from_pretrained(source, backend="pil", trust_remote_code=False, **options)
        if not isinstance(found, BaseImageProcessor):
            raise ValueError(f"{type(found).__name__} is no image processor of transformers")
        return found
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    return tokenizer


def check_processor(processor: object, task: str) -> None:
    """``ModelError`` unless ``processor`` is of the kind that models of ``task`` need."""
    wanted = BaseImageProcessor if task in IMAGE_TASKS else PreTrainedTokenizerBase
    if not isinstance(processor, wanted):
        what = "an image processor" if task in IMAGE_TASKS else "a tokenizer"
        raise ModelError(f"a model for {task} needs {what} of transformers beside it, got {type(processor).__name__}")


def need_tokenizer(processor: Processor) -> PreTrainedTokenizerBase:
    """``processor`` if it is a tokenizer, else ``ModelError``."""
    if not isinstance(processor, PreTrainedTokenizerBase):
        raise ModelError(f"this model has no tokenizer: {type(processor).__name__} prepares images, not text")
    return processor


def known_image_processors() -> set[str]:
    """Names of the image processors that transformers itself has, in every form in which files name them."""
    table: Any = image_processing_auto
    names: set[str] = set()
    for entry in table.IMAGE_PROCESSOR_MAPPING_NAMES.values():
        names |= {name for name in (entry.values() if isinstance(entry, dict) else entry) if name}
    return names | {name.removesuffix(end) + other for name in names for end in _BACKENDS for other in ("", *_BACKENDS)}
