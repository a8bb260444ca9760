"""The rows of each client as files, and who holds how much of which domain."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped,unused-ignore]

from offsite_fl.comparing.partitions import OWNER, parse_partition
from offsite_fl.comparing.settings import DataPart
from offsite_fl.data.sources import load_source
from offsite_fl.errors import DataError
from offsite_fl.evaluation import checks
from offsite_fl.evaluation.record import replace_file

HOLDINGS = "holdings.json"
TEXT = "text"


def client_name(number: int) -> str:
    """What a client is called, in files and as a Flower site: its random streams derive from that."""
    return f"client-{number}"


def read_rows(data: DataPart) -> Dataset:
    """All domains' rows with the columns ``text`` and ``owner``, in the order of the owners."""
    rows: dict[str, list[str]] = {TEXT: [], OWNER: []}
    for owner, path in zip(data.owners, data.owner_files(), strict=True):
        source = load_source(path)
        if TEXT not in source.column_names:
            raise DataError(f"{path}: needs the column {TEXT!r}; it has {', '.join(source.column_names)}")
        texts = [text for text in source[TEXT] if isinstance(text, str) and text.strip()]
        rows[TEXT] += texts
        rows[OWNER] += [owner] * len(texts)
    return Dataset.from_dict(rows)


def divide(rows: Dataset, partition: str, clients: int, seed: int, folder: Path, digest: str) -> None:
    """Write one file a client and ``holdings.json``, unless they are there already and made of the same rows."""
    wanted = {"partition": repr(parse_partition(partition)), "digest": digest, "seed": seed}
    if (folder / HOLDINGS).is_file() and _table(folder).get("made") == wanted:
        return
    shares = parse_partition(partition).divide(rows, clients, seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts, owners = rows[TEXT], rows[OWNER]
    holdings: dict[str, dict[str, int]] = {}
    for number, share in enumerate(shares):
        lines = [json.dumps({TEXT: texts[i], OWNER: owners[i]}, ensure_ascii=False) + "\n" for i in share]
        replace_file(folder / f"{client_name(number)}.jsonl", "".join(lines))
        held = holdings.setdefault(client_name(number), {})
        for i in share:
            held[owners[i]] = held.get(owners[i], 0) + len(texts[i])
    replace_file(folder / HOLDINGS, json.dumps({"made": wanted, "characters": holdings}, indent=1) + "\n")


def read_holdings(folder: Path) -> dict[str, dict[str, int]]:
    """Characters by client and domain."""
    table = checks.entries(_table(folder).get("characters"), str(folder / HOLDINGS))
    return {
        name: {owner: checks.whole(count, f"{name}.{owner}") for owner, count in checks.entries(held, name).items()}
        for name, held in table.items()
    }


def _table(folder: Path) -> dict[str, object]:
    path = folder / HOLDINGS
    try:
        return checks.entries(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: run the comparison again") from None
    except ValueError as error:
        raise DataError(f"{path} isn't valid JSON: {error}") from error


def mixture(held: Mapping[str, int], by_domain: Mapping[str, float]) -> float:
    """A loss on a client's own kind of text: the domains' losses weighted by what it holds of them.

    >>> mixture({"a": 3, "b": 1}, {"a": 2.0, "b": 4.0})
    2.5
    """
    total = sum(held.values())
    return sum(count * by_domain[owner] for owner, count in held.items()) / total
