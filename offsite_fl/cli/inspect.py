"""``offsite-fl inspect``: verify a bundle and say what is in it, or what a model is made of, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offsite_fl.cli.contents import contents, print_contents
from offsite_fl.cli.output import AsJson, Stages, emit, result
from offsite_fl.cli.structure import print_structure, structure

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE")]
Either = Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL")]
Digest = Annotated[
    str | None, typer.Option(metavar="SHA256", help="The digest it must have, as the model owner told it.")
]


def inspect(bundle: Either, digest: Digest = None, as_json: AsJson = False) -> None:
    """Check every digest and shape of a bundle and list what it holds, or list what a model is made of.

    BUNDLE is the bundle's folder. Where the model owner's map lies beside it, also how much of the full model leaves
    with it.

    MODEL is a folder with a config.json, or smollm2: its blocks, the tensors outside them, and which splits and
    emulators there can be, all from the config alone.
    """
    if digest is None and _is_model(bundle):
        _inspect_model(str(bundle), as_json)
        return
    stages = Stages()
    with stages(f"verifying {bundle}"):
        from offsite_fl.bundle import OwnerMap, open_bundle

        opened = open_bundle(bundle, digest=digest)
    note = OwnerMap.load(opened.path) if OwnerMap.path_for(opened.path).is_file() else None
    if note is not None:
        note.check(digest=opened.digest)
    found = contents(opened, note)
    if as_json:
        emit(found)
    else:
        print_contents(found, result())


def _is_model(path: Path) -> bool:
    """A folder with a config and no manifest, or the name of a packaged model; all else is meant to be a bundle."""
    from offsite_fl.models.load import PACKAGED

    config, manifest = path / "config.json", path / "manifest.json"
    return str(path) in PACKAGED or (config.is_file() and not manifest.exists())


def _inspect_model(path: str, as_json: bool) -> None:
    stages = Stages()
    with stages(f"reading the config of {path}"):
        found = structure(path)
    if as_json:
        emit(found)
    else:
        print_structure(found, result())
