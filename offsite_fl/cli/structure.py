"""What a model folder holds, read off its config alone: blocks, shared tensors, sizes, and what can be done with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from offsite_fl.cli.output import line
from offsite_fl.errors import OffsiteError
from offsite_fl.sizes import human_bytes

if TYPE_CHECKING:
    from torch import nn

    from offsite_fl.models.blocks import Blocks

# The splits of the papers: Offsite-Tuning, FedBiOT, and the smallest.
SPLITS = ("2-2", "0-2", "1-1")


def structure(path: str) -> dict[str, Any]:
    """Everything worth telling about the model at ``path``; no weight is loaded, the model is built on ``meta``.

    Errors as in :func:`~offsite_fl.models.load.load_model`, and ``ModelError`` if no blocks are found.
    """
    from offsite_fl.emulators import describe_emulators
    from offsite_fl.emulators.applies import why_not
    from offsite_fl.models.blocks import block_list, find_blocks
    from offsite_fl.models.load import load_structure, stored_dtype
    from offsite_fl.models.network import shared_tensors

    model, task = load_structure(path)
    dtype = stored_dtype(path)
    blocks = find_blocks(model)
    counts = [sum(p.numel() for p in block.parameters()) for block in block_list(model, blocks)]
    shared = {name.removeprefix("shared."): tensor for name, tensor in shared_tensors(model, blocks).items()}
    parameters = sum(p.numel() for p in model.parameters())
    splits = [_split(model, blocks, split) for split in SPLITS]
    none = "none of these splits can be made" if all(split["reason"] for split in splits) else None
    return {
        "model": str(path),
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "task": task,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": parameters,
        "bytes": parameters * dtype.itemsize,
        "blocks": {
            "path": blocks.path,
            "class": blocks.cls,
            "depth": blocks.depth,
            "bytes": [count * dtype.itemsize for count in counts],
        },
        "shared": [
            {"name": name, "shape": list(tensor.shape), "bytes": tensor.numel() * dtype.itemsize}
            for name, tensor in shared.items()
        ],
        "shared_bytes": sum(tensor.numel() for tensor in shared.values()) * dtype.itemsize,
        "splits": splits,
        "emulators": [
            {"name": method.name, "reason": none or why_not(method.name, model, blocks)}
            for method in describe_emulators()
        ],
    }


def _split(model: nn.Module, blocks: Blocks, text: str) -> dict[str, Any]:
    """Whether the model can be split so: at all, and with the blocks in between left out."""
    from offsite_fl.models.blocks import block_list
    from offsite_fl.models.network import plan_network
    from offsite_fl.models.split import Split

    stack = block_list(model, blocks)

    def reason(kept: slice) -> str | None:
        try:
            split = Split.parse(text)
            middle = split.middle(blocks.depth)[kept]
            layout = {index: slot for slot, index in enumerate(middle)}
            plan_network(model, blocks, split.resolve(blocks.depth), layout, [stack[i] for i in middle], middle)
        except OffsiteError as error:
            return str(error)
        return None

    whole = reason(slice(None))
    # The last block of the middle alone: it and all behind it have then moved as far as they can.
    return {"split": text, "reason": whole, "reason_dropping": whole or reason(slice(-1, None))}


def print_structure(found: Mapping[str, Any], console: Console) -> None:
    """Print what :func:`structure` found."""
    blocks = found["blocks"]
    name = f"{found['class']} ({found['model_type']})"
    console.print(line(f"model {found['model']}: {name}, for {found['task']}"), soft_wrap=True)
    size = f"{found['parameters']:,} parameters, {human_bytes(found['bytes'])} in {found['dtype']}"
    console.print(f"{size}; no weight was loaded", soft_wrap=True)
    each = sorted({human_bytes(size) for size in blocks["bytes"]})
    sizes = each[0] if len(each) == 1 else f"{each[0]} to {each[-1]}"
    stack = f"{blocks['depth']} x {blocks['class']} at {blocks['path']}"
    console.print(line(f"blocks: {stack}, {sizes} each"), soft_wrap=True)
    console.print(_shared_table(found))
    console.print(_splits_table(found))
    console.print(_emulators_table(found))


def _shared_table(found: Mapping[str, Any]) -> Table:
    table = Table(title="Outside the blocks: every data owner gets these", title_justify="left", show_footer=True)
    table.add_column("tensor", footer="all")
    table.add_column("shape")
    table.add_column("bytes", footer=human_bytes(found["shared_bytes"]), justify="right")
    # A vision tower has hundreds; the largest tell what they are.
    largest = sorted(found["shared"], key=lambda entry: -entry["bytes"])
    for entry in largest[:12]:
        table.add_row(line(entry["name"]), "x".join(map(str, entry["shape"])), human_bytes(entry["bytes"]))
    if len(largest) > 12:
        rest = sum(entry["bytes"] for entry in largest[12:])
        table.add_row(f"{len(largest) - 12} smaller ones", "", human_bytes(rest))
    return table


def _splits_table(found: Mapping[str, Any]) -> Table:
    table = Table(title="Splits (first-last)", title_justify="left")
    for name in ("split", "emulators that keep all blocks", "emulators that leave blocks out"):
        table.add_column(name)
    for entry in found["splits"]:
        whole, dropping = entry["reason"], entry["reason_dropping"]
        table.add_row(entry["split"], line(whole or "yes"), line("" if whole else dropping or "yes"))
    return table


def _emulators_table(found: Mapping[str, Any]) -> Table:
    table = Table(title="Emulators", title_justify="left")
    for name in ("emulator", "applies"):
        table.add_column(name)
    for entry in found["emulators"]:
        table.add_row(entry["name"], line(f"no: {entry['reason']}" if entry["reason"] else "yes"))
    return table
