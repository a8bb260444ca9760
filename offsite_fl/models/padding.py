"""Whether a classifier of texts takes several of them at once: decoders look for their end by the padding token."""

from __future__ import annotations

import torch
from torch import nn

from offsite_fl.errors import ModelError
from offsite_fl.models.probe import probe_batch


def need_padding(model: nn.Module) -> None:
    """``ModelError`` if ``model``, whose config names no padding token, takes one text at a time only for want of it.

    Tried on two short texts, since by a config alone nobody knows: encoders go by the attention mask.
    """
    if getattr(getattr(model, "config", None), "pad_token_id", None) is not None:
        return
    try:
        with torch.no_grad():
            model(**probe_batch(model, rows=2))
    except ValueError as error:
        raise ModelError(
            f"{type(model).__name__} can't classify several texts at once: {error} Set pad_token_id in its config "
            "(model.config.pad_token_id), as a rule to the tokenizer's"
        ) from error
    except Exception:  # on the meta device, or if it wants more than a text, it may fail in any other way
        return
