"""``offsite-fl bundle``: the model owner makes what the data owners get."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import rich
import typer

from offsite_fl.cli.contents import contents, print_contents
from offsite_fl.cli.files import check_writable
from offsite_fl.cli.output import AsJson, Stages, emit, line, result
from offsite_fl.cli.settings import DTYPES, dtype_of, head_of
from offsite_fl.cli.spread import SpreadSplit, cut_of, provisional_split, split_owner
from offsite_fl.errors import ConfigError

Model = Annotated[str, typer.Argument(metavar="MODEL")]


def bundle(
    model: Model,
    emulator: Annotated[
        str,
        typer.Option(
            metavar="SPEC",
            help="How the middle is compressed: name:key=value,..., chained with +. `offsite-fl emulators` lists them.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the bundle; it appears whole or not at all.")],
    first: Annotated[int | None, typer.Option(help="How many of the first blocks are adapter (2).")] = None,
    last: Annotated[int | None, typer.Option(help="How many of the last blocks are adapter (2).")] = None,
    at: Annotated[str | None, typer.Option(metavar="0,5,...", help="Or exactly these blocks, from 0.")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT",
            help="Or first-last as 2-2, or at=0,5,..., or spread=KEEP/ADAPTER: so many blocks kept in all, of which so "
            "many are adapter, placed as CRaSh does by the --calibration text.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Public text for methods that look at activations.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How much of it is used.")] = 8192,
    block_size: Annotated[int, typer.Option(min=2, help="Tokens in an example of it.")] = 128,
    head: Annotated[
        str,
        typer.Option(
            metavar="auto|none|PATH,...",
            help="What is trained outside the blocks: a classifier's head, nothing, or these parameters or modules.",
        ),
    ] = "auto",
    class_means: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled public examples of each class: begin with the nearest-class-mean head that they make.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of emulator and shared tensors in the files: {', '.join(DTYPES)}.")
    ] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Bound of one file of weights.")] = "256MB",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random in the method.")] = 0,
    workdir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where long methods keep what they need to resume.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is in DIR, and its map.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compress the model's middle and write a bundle: adapter, emulator, shared tensors, and the tokenizer or image
    processor.

    MODEL is a folder as Hugging Face writes it, a hub id, or smollm2 (the model that comes in a Python package).

    The owner-private map (which tensor came from where) is written beside it, as DIR.owner.json, and stays here.
    """
    cut, stages = cut_of(first, last, at, split), Stages()
    with stages("getting ready"):
        from offsite_fl.bundle import OwnerMap
        from offsite_fl.bundle.manifest import MANIFEST
        from offsite_fl.bundle.write import check_target
        from offsite_fl.emulators import parse_emulator
        from offsite_fl.owner import ModelOwner
        from offsite_fl.sizes import parse_bytes

        # Before the long work, which would be lost.
        method, kept = parse_emulator(emulator), dtype_of(dtype)
        parse_bytes(shard_size)
        if isinstance(cut, SpreadSplit):
            cut.check(calibration)
        check_writable(out)
        check_target(out)
        if (out / MANIFEST).is_file() and not force:
            raise ConfigError(
                f"{out} holds a bundle, whose map is needed to plug in updates that are still out; give another --out, "
                "or --force to replace it"
            )
    with stages(f"opening {model}"):
        provisional = provisional_split() if isinstance(cut, SpreadSplit) else cut
        owner = ModelOwner.from_pretrained(model, provisional, head=head_of(head))
        if class_means is not None:
            owner.set_nearest_mean_head(class_means, block_size=block_size)
    if isinstance(cut, SpreadSplit):
        with stages(f"placing the adapter: {cut}"):
            owner = split_owner(owner, cut, method, calibration, calibration_tokens, block_size, seed)
        rich.print(line(f"split {cut} is {owner.split} on {calibration}"))
    with stages(f"compressing the middle: {method}"):
        made = owner.make_bundle(
            method,
            out,
            calibration=calibration,
            calibration_tokens=calibration_tokens,
            block_size=block_size,
            dtype=kept,
            shard_bytes=shard_size,
            seed=seed,
            workdir=workdir,
            progress=True,
        )
    note = OwnerMap.load(made.path)
    found = contents(made, note) | {"seconds": stages.seconds}
    if as_json:
        emit(found)
        return
    print_contents(found, result())
    result().print(line(f"the map, for the model owner only: {note.path_for(made.path)}"), soft_wrap=True)
