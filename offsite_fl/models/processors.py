"""What turns a data owner's files into a model's inputs: a tokenizer, or the image processor of a vision model."""

from __future__ import annotations

from typing import Any, TypeAlias

from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto import image_processing_auto
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from offsite_fl.errors import ModelError
from offsite_fl.models.timm_pixels import processor_of_timm

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
        return on_pil(found)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    return tokenizer


def on_pil(processor: Processor) -> Processor:
    """``processor``, or the same one on PIL and NumPy where it works by torchvision.

    torchvision resizes to other numbers, and with it installed transformers takes it by default: of two parties with
    and without it each would see other pixels. ``ModelError`` if there is no such form.
    """
    if isinstance(processor, TimmWrapperImageProcessor):
        return processor_of_timm(processor.data_config)
    if not isinstance(processor, TorchvisionBackend):
        return processor
    name = type(processor).__name__.removesuffix("Fast")
    found = image_processing_auto.get_image_processor_class_from_name(f"{name}Pil")
    if not isinstance(found, type) or not issubclass(found, PilBackend):
        raise ModelError(f"{name} works by torchvision alone, and other parties needn't have it: give one on PIL")
    made: BaseImageProcessor = found.from_dict(processor.to_dict())
    return made


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
