"""``offsite-fl inspect``: verify a bundle and say what is in it, to whoever holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offsite_fl.cli.contents import contents, print_contents
from offsite_fl.cli.output import AsJson, Stages, emit, result

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE")]
Digest = Annotated[
    str | None, typer.Option(metavar="SHA256", help="The digest it must have, as the model owner told it.")
]


def inspect(bundle: Folder, digest: Digest = None, as_json: AsJson = False) -> None:
    """Check every digest and shape of a bundle and list what it holds.

    BUNDLE is the bundle's folder.

    Where the model owner's map lies beside it, also how much of the full model leaves with it.
    """
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
