"""Open a model and its tokenizer: a Hugging Face folder, a hub id, or ``smollm2``, the one that comes in a package."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from offsite_fl.errors import ModelError
from offsite_fl.models import smollm2
from offsite_fl.models.tasks import TASKS, build_model, check_task, task_of_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "smollm2"
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
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a model in eval mode, with its tokenizer. Only safetensors are read, and no code from the folder runs.

    Parameters
    ----------
    path_or_id
        A folder as ``save_pretrained`` writes it, a hub id, or ``"smollm2"``.
    task
        What the model is for; a key of :data:`~offsite_fl.models.tasks.TASKS`. None takes the one that the config
        names.
    dtype
        Of the weights in memory.

    Raises
    ------
    ModelError
        If the folder or id doesn't exist, can't be reached, holds no model for ``task``, no safetensors, no tokenizer,
        or needs code of its own.
    """
    if task is not None:
        check_task(task)
    source = _source(path_or_id)
    if task is None:
        task = task_of_config(_open(AutoConfig, source, f"the config of {path_or_id}"))
    model = _open(TASKS[task], source, f"model {path_or_id}", dtype=dtype, use_safetensors=True)
    tokenizer = _open(AutoTokenizer, source, f"the tokenizer of {path_or_id}")
    return model.eval(), tokenizer


def stored_dtype(path_or_id: str | os.PathLike[str]) -> torch.dtype:
    """The dtype that a model's files say they hold, fp32 where they don't say; errors as in :func:`load_model`."""
    dtype = _open(AutoConfig, _source(path_or_id), f"the config of {path_or_id}").dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _source(path_or_id: str | os.PathLike[str]) -> str:
    """Return the folder or hub id to open; a path that doesn't exist is told apart from an id."""
    text = os.fspath(path_or_id)
    if text == PACKAGED:
        return str(smollm2.convert())
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no config.json; a model folder is what save_pretrained writes")
        return str(folder)
    if folder.exists() or isinstance(path_or_id, Path) or not HUB_ID.fullmatch(text):
        what = "is not a folder" if folder.exists() else "doesn't exist"
        raise ModelError(f"model folder {text} {what}; give a folder, a hub id (owner/name) or '{PACKAGED}'")
    return text


def _open(auto: Any, source: str, what: str, **options: Any) -> Any:
    """Call ``from_pretrained`` and turn what it throws at a user's mistake into one sentence."""
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
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
