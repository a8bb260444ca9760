"""What a bundle holds, as plain data for ``--json`` and as tables: what leaves the model owner's house."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from offsite_fl.cli.output import line

if TYPE_CHECKING:
    from offsite_fl.bundle import Bundle, OwnerMap
    from offsite_fl.models.network import NetworkPlan


def contents(bundle: Bundle, note: OwnerMap | None) -> dict[str, Any]:
    """Everything worth telling about ``bundle``; with the owner's map also its share of the full model."""
    from offsite_fl.models.processors import IMAGE_TASKS

    full = note.report.get("full_bytes") if note else None
    kinds = {}
    for kind, size in bundle.bytes_by_kind().items():
        shards = [shard for shard in bundle.manifest.shards if shard.kind == kind]
        entries = [entry for shard in shards for entry in shard.tensors.values()]
        kinds[kind] = {
            "bytes": size,
            "tensors": len(entries),
            "dtypes": sorted({entry.dtype for entry in entries}),
            "share_of_full_model": size / full if full else None,
        }
    return {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "format_version": bundle.manifest.format_version,
        "library_version": bundle.manifest.library_version,
        "model_type": bundle.plan.config["model_type"],
        "task": bundle.plan.task,
        "head": list(bundle.plan.head),
        "processor": "image processor" if bundle.plan.task in IMAGE_TASKS else "tokenizer",
        "bytes": bundle.total_bytes,
        "share_of_full_model": bundle.total_bytes / full if full else None,
        "kinds": kinds,
        "places": [[place.role, place.slot] for place in bundle.plan.layout],
        "emulator": emulator_blocks(bundle.plan),
        "owner": _owner(note, bundle) if note else None,
    }


def _owner(note: OwnerMap, bundle: Bundle) -> dict[str, Any]:
    report = dict(note.report)
    return {
        "map": str(note.path_for(bundle.path)),
        "split": note.split,
        "emulator": note.emulator,
        "blocks": note.blocks_path,
        "adapter": list(note.adapter),
        "report": report,
    }


def emulator_blocks(plan: NetworkPlan) -> list[dict[str, Any]]:
    """Each block of the emulator: where in the network it runs, and how many of its linears were replaced by what."""
    found = []
    for slot, linears in enumerate(plan.linears):
        places = [i for i, place in enumerate(plan.layout) if place.role == "emulator" and place.slot == slot]
        kinds: dict[str, list[int]] = {}
        for entry in linears.values():
            kind, size = _kind(entry)
            kinds.setdefault(kind, []).append(size)
        counts = {kind: {"count": len(sizes), "from": min(sizes), "to": max(sizes)} for kind, sizes in kinds.items()}
        found.append({"slot": slot, "places": places, "linears": counts})
    return found


def _kind(entry: Mapping[str, Any]) -> tuple[str, int]:
    """What a linear was replaced with, and the size that varies within that kind."""
    if entry["kind"] == "quantized":
        return f"int{entry['bits']}, groups of", int(entry["group"])
    if entry["kind"] == "low-rank":
        return "low-rank, rank", int(entry["rank"])
    if entry["kind"] == "harmonizer":
        return "harmonizer in place of the block, rank", int(entry["rank"])
    return "resized, outputs", int(entry["out"])


def print_contents(found: Mapping[str, Any], console: Console) -> None:
    """Print what :func:`contents` found: sizes by kind, the network's structure, and what only the owner knows."""
    console.print(line(f"bundle {found['bundle']}: verified"), soft_wrap=True)
    console.print(line(f"digest {found['digest']}"), soft_wrap=True)
    head = f"trained head: {', '.join(found['head'])}" if found["head"] else "no tensor outside the blocks is trained"
    console.print(line(f"for {found['task']}, with {found['processor']}; {head}"), soft_wrap=True)
    console.print(_kinds_table(found))
    console.print(_structure_table(found))
    if found["owner"]:
        console.print(_owner_table(found["owner"]))


def _kinds_table(found: Mapping[str, Any]) -> Table:
    from offsite_fl.sizes import human_bytes

    known = found["share_of_full_model"] is not None
    table = Table(title="What leaves", title_justify="left", show_footer=True)
    table.add_column("kind", footer="all")
    table.add_column("bytes", footer=human_bytes(found["bytes"]), justify="right")
    table.add_column("tensors", footer=str(sum(k["tensors"] for k in found["kinds"].values())), justify="right")
    table.add_column("dtypes")
    if known:
        table.add_column("of the full model", footer=_percent(found["share_of_full_model"]), justify="right")
    for kind, entry in found["kinds"].items():
        tensors = str(entry["tensors"] or "")
        cells = [kind, human_bytes(entry["bytes"]), tensors, " ".join(entry["dtypes"])]
        table.add_row(*cells, *([_percent(entry["share_of_full_model"])] if known else []))
    return table


def _structure_table(found: Mapping[str, Any]) -> Table:
    """The network in forward order, neighbours of one structure in one row."""
    table = Table(title=f"The network ({found['model_type']})", title_justify="left")
    table.add_column("places", justify="right")
    for name in ("part", "linears"):
        table.add_column(name)
    rows: list[tuple[int, str, str]] = []
    for place, (role, slot) in enumerate(found["places"]):
        said = _structure(found["emulator"][slot]) if role == "emulator" else "dense, trained"
        if rows and rows[-1][1:] == (role, said):
            continue
        rows.append((place, role, said))
    ends = [first for first, _, _ in rows[1:]] + [len(found["places"])]
    for (first, role, said), end in zip(rows, ends, strict=True):
        table.add_row(f"{first}" if end == first + 1 else f"{first}-{end - 1}", role, said)
    return table


def _structure(block: Mapping[str, Any]) -> str:
    parts = []
    for kind, sizes in block["linears"].items():
        span = str(sizes["from"]) + (f" to {sizes['to']}" if sizes["to"] > sizes["from"] else "")
        parts.append(f"{sizes['count']} {kind} {span}")
    shared = f", one block run at {len(block['places'])} places" if len(block["places"]) > 1 else ""
    return ("; ".join(parts) or "dense") + shared


def _owner_table(owner: Mapping[str, Any]) -> Table:
    """What the owner's map adds; it stays with the owner."""
    table = Table(title="Known to the model owner only", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("")
    table.add_row("emulator", line(owner["emulator"]))
    table.add_row("adapter blocks", ", ".join(map(str, owner["adapter"])) + f" (split {owner['split']})")
    for name, said in _report_rows(owner["report"]):
        table.add_row(name, said)
    return table


def _report_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The emulator report in words; a number that wasn't measured has no row, save where that needs saying."""
    from offsite_fl.evaluation.rows import significant
    from offsite_fl.sizes import human_bytes

    if not report:
        return []
    size, middle = report["bytes"], report["middle_bytes"]
    rows = [
        ("emulator in memory", f"{human_bytes(size)}, {_percent(size / middle)} of the middle's {human_bytes(middle)}"),
        ("leaves verbatim", f"{_percent(report['verbatim_share'])} of the full model's parameters"),
        *(("note", note) for note in report.get("notes", ())),
    ]
    if report["flops_share"] is not None:
        rows.insert(1, ("forward FLOPs", f"{_percent(report['flops_share'])} of the middle's"))
    if report["hidden_error"] is None or report["perplexity"] is None:
        return [*rows, ("quality", "not measured: no calibration text was given")]
    return [
        *rows,
        ("hidden-state error", significant(report["hidden_error"])),
        ("perplexity, calibration", significant(report["perplexity"])),
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}"
