"""The small model in the cache, made on first use."""

from __future__ import annotations

import tempfile
from pathlib import Path

from offsite_fl.config import cache_root
from simulations.pico.pretrain import pretrain
from simulations.pico.recipe import Recipe
from simulations.pico.tokenizer import train_tokenizer
from simulations.texts import bible


def pico_folder(recipe: Recipe | None = None, *, text: str | None = None, progress: bool = True) -> Path:
    """The folder of the model that ``recipe`` makes of ``text`` (default: the King James Bible).

    An ordinary Hugging Face folder, named by a digest of recipe and text. It appears by one rename, so it is whole or
    absent, also when two processes make it at once or one is ended half-way.

    Raises
    ------
    DataError
        The texts aren't in the cache; says which command fetches them.
    """
    recipe = recipe or Recipe()
    text = bible() if text is None else text
    folder = cache_root() / f"pico-{recipe.digest(text)[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        tokenizer = train_tokenizer(text, recipe.vocabulary, recipe.positions)
        pretrain(recipe, text, tokenizer, progress).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        try:
            fresh.rename(folder)
        except OSError:
            if not folder.is_dir():  # if it is, another process was faster, with the same result
                raise
    return folder
