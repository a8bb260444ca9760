"""The small model in the cache, made on first use."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from offsite_fl.config import cache_root
from simulations.pico.pretrain import pretrain
from simulations.pico.recipe import Recipe
from simulations.pico.tokenizer import train_tokenizer
from simulations.texts import public_books


def pico_link() -> Path:
    """Where the default model is found by those who know no recipe: a link in the cache, set by :func:`pico_folder`."""
    return cache_root() / "pico"


def pico_folder(recipe: Recipe | None = None, *, text: str | None = None, progress: bool = True) -> Path:
    """The folder of the model that ``recipe`` makes of ``text`` (default: the public books of the King James Bible).

    An ordinary Hugging Face folder, named by a digest of recipe and text. It appears by one rename, so it is whole or
    absent, also when two processes make it at once or one is ended half-way.

    Raises
    ------
    DataError
        The texts aren't in the cache; says which command fetches them.
    """
    default = recipe is None and text is None
    recipe = recipe or Recipe()
    text = public_books() if text is None else text
    folder = cache_root() / f"pico-{recipe.digest(text)[:16]}"
    if not folder.is_dir():
        _make(folder, recipe, text, progress)
    if default:
        _point(pico_link(), folder)
    return folder


def _make(folder: Path, recipe: Recipe, text: str, progress: bool) -> None:
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


def _point(link: Path, folder: Path) -> None:
    """Let ``link`` name ``folder``, in one step."""
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.symlink_to(folder.name)
    os.replace(fresh, link)
