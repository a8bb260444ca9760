"""Open a model and its tokenizer: a Hugging Face folder, a hub id, or one that comes in a package, like ``smollm2``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from offsite_fl.errors import ModelError
from offsite_fl.models import dinov2, minilm, smollm2
from offsite_fl.models.processors import IMAGE_TASKS, Processor, open_processor
from offsite_fl.models.tasks import TASKS, build_model, check_task, task_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of the models that come in packages, and what finds or makes the folder of each.
PACKAGED: dict[str, Callable[[], Path]] = {
    "smollm2": smollm2.convert,
    dinov2.NAME: dinov2.convert,
    minilm.NAME: minilm.folder,
}
# What transformers throws at a folder, a config or an id that isn't right.
_USERS_MISTAKES = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    SafetensorError,
)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_model(
    path_or_id: str | os.PathLike[str], task: str | None = "causal-lm", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Processor]:
    """Open a model in eval mode, with its tokenizer, or its image processor where it is for images.

    Only safetensors are read, and no code from the folder runs.

    Parameters
    ----------
    path_or_id
        A folder as ``save_pretrained`` writes it, a hub id, or a name of :data:`PACKAGED`.
    task
        What the model is for; a key of :data:`~offsite_fl.models.tasks.TASKS`. None takes the one that the config
        names.
    dtype
        Of the weights in memory.

    Raises
    ------
    ModelError
        If the folder or id doesn't exist, can't be reached, holds no model for ``task``, no safetensors,
        no tokenizer or image processor,
        or needs code of its own.
    """
    if task is not None:
        check_task(task)
    source = _source(path_or_id)
    if task is None:
        task = task_of_config(_open(AutoConfig, source, f"the config of {path_or_id}"))
    model = _open(TASKS[task], source, f"model {path_or_id}", dtype=dtype, use_safetensors=True)
    return model.eval(), load_processor(path_or_id, task)


def load_processor(path_or_id: str | os.PathLike[str], task: str) -> Processor:
    """The tokenizer or image processor of a model for ``task``; errors as in :func:`load_model`."""
    source = _source(path_or_id)
    what = "image processor" if task in IMAGE_TASKS else "tokenizer"
    with _told(source, f"the {what} of {path_or_id}"):
        return open_processor(source, task)


def stored_dtype(path_or_id: str | os.PathLike[str]) -> torch.dtype:
    """The dtype that a model's files say they hold, fp32 where they don't say; errors as in :func:`load_model`."""
    dtype = _open(AutoConfig, _source(path_or_id), f"the config of {path_or_id}").dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _source(path_or_id: str | os.PathLike[str]) -> str:
    """Return the folder or hub id to open; a path that doesn't exist is told apart from an id."""
    text = os.fspath(path_or_id)
    if text in PACKAGED:
        return str(PACKAGED[text]())
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no config.json; a model folder is what save_pretrained writes")
        return str(folder)
    if folder.exists() or isinstance(path_or_id, Path) or not HUB_ID.fullmatch(text):
        what = "is not a folder" if folder.exists() else "doesn't exist"
        named = " or ".join(f"'{name}'" for name in PACKAGED)
        raise ModelError(f"model folder {text} {what}; give a folder, a hub id (owner/name) or {named}")
    return text


def _open(auto: Any, source: str, what: str, **options: Any) -> Any:
    """Call ``from_pretrained`` and turn what it throws at a user's mistake into one sentence."""
    with _told(source, what):
        return auto.from_pretrained(source, trust_remote_code=False, **options)


@contextmanager
def _told(source: str, what: str) -> Iterator[None]:
    try:
        yield
    except _USERS_MISTAKES as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        local = Path(source).is_dir()
        where = "" if local else f"; '{source}' is neither a folder here nor, as far as can be reached, a hub id"
        raise ModelError(f"can't open {what}: {reason}{where}") from error


def load_structure(path_or_id: str | os.PathLike[str]) -> tuple[PreTrainedModel, str]:
    """A model on the meta device from its config alone, and its task; errors as in :func:`load_model`."""
    config = _open(AutoConfig, _source(path_or_id), f"the config of {path_or_id}")
    task = task_of_config(config)
    try:
        with torch.device("meta"):
            model: Any = build_model(task, config)
    except Exception as error:  # a config reaches many constructors; all their complaints mean the same here
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"transformers can't build the model of {path_or_id} from its config: {reason}") from error
    return model.eval(), task


def load_classifier(
    path_or_id: str | os.PathLike[str], task: str, labels: Sequence[str], dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, Processor]:
    """Open a model as a classifier of ``labels``, in eval mode, with a new head that answers nothing yet.

    With it comes its tokenizer, or its image processor.

    A head that the files have for other labels is left out. Its tensors with a row for each class are zero; what else
    of it is new, as the hidden layer of some heads, is drawn by transformers. Errors are those of :func:`load_model`,
    and ``ModelError`` where the files lack more than the head, which would be left at random numbers.

    Parameters
    ----------
    path_or_id
        As in :func:`load_model`.
    task
        ``"image-classification"``, ``"sequence-classification"`` or another task with labels.
    labels
        Names of the classes, in the order of the logits.
    dtype
        Of the weights in memory.
    """
    source = _source(path_or_id)
    config = _open(AutoConfig, source, f"the config of {path_or_id}")
    renamed = list(config.id2label.values()) != list(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    model, info = _open(TASKS[check_task(task)], source, f"model {path_or_id}", **options)
    fresh = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    base = f"{model.base_model_prefix}."
    inside = sorted(name for name in fresh if name.startswith(base))
    if inside:
        raise ModelError(f"the files of {path_or_id} lack {', '.join(inside[:3])} of {len(inside)} tensors for {task}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            new = name in fresh or (renamed and not name.startswith(base))
            if new and parameter.shape[:1] == (len(labels),):
                parameter.zero_()
    return model.eval(), load_processor(path_or_id, task)
