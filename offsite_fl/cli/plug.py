"""``offsite-fl plug``: the model owner puts an update into the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offsite_fl.cli.bundle import Model
from offsite_fl.cli.files import check_new_folder, new_folder
from offsite_fl.cli.output import AsJson, Stages, emit, line, result
from offsite_fl.cli.parties import open_owner, read_repair, read_update
from offsite_fl.cli.settings import DTYPES, dtype_of

BundleOption = Annotated[
    Path,
    typer.Option(metavar="BUNDLE", help="Folder of the bundle that was handed out, with the owner's map beside it."),
]

RepairOption = Annotated[
    Path | None, typer.Option(metavar="REPAIR", help="From `offsite-fl repair`; taken out of the update.")
]


def plug(
    model: Model,
    update: Annotated[Path, typer.Argument(metavar="UPDATE")],
    bundle: BundleOption,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the adapted model; new or empty.")],
    dtype: Annotated[
        str | None, typer.Option(help=f"Of the adapted model: {', '.join(DTYPES)}; that of MODEL's files if not given.")
    ] = None,
    repair: RepairOption = None,
    as_json: AsJson = False,
) -> None:
    """Plug an update into the full model and save it as an ordinary Hugging Face folder.

    MODEL is a folder, a hub id, or smollm2; UPDATE the file that a data owner or a federation handed back.

    Exactly the adapter's tensors change. An update that doesn't fit changes nothing and writes nothing.
    """
    stages = Stages()
    with stages(f"opening {model}"):
        from offsite_fl.bundle import OwnerMap, open_bundle
        from offsite_fl.models.load import stored_dtype

        check_new_folder(out)
        opened = open_bundle(bundle)
        came, note = read_update(update, opened), OwnerMap.load(opened.path)
        less = read_repair(repair, opened)
        kept = dtype_of(dtype) or stored_dtype(model)
        owner = open_owner(model, opened, note)
    with stages(f"writing {out}"):
        # Cast first, so that values which don't survive the cast are refused like any others that don't fit.
        owner.model.to(kept)
        owner.plug_in(came, less)
        with new_folder(out) as folder:
            owner.save(folder)
    found = {
        "model": str(out),
        "dtype": str(kept).removeprefix("torch."),
        "changed_tensors": len(owner.adapter()),
        "adapter": list(owner.adapter_indices),
        "num_examples": came.num_examples,
        "repair": str(repair) if repair else None,
        "seconds": stages.seconds,
    }
    if as_json:
        emit(found)
        return
    blocks = ", ".join(map(str, owner.adapter_indices))
    said = f"adapted model {out}: {found['changed_tensors']} tensors in blocks {blocks} are new, in {found['dtype']}"
    result().print(line(said), soft_wrap=True)
