"""The model owner's private note to a bundle: where its tensors came from. Lies beside the bundle, never in it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from offsite_fl.bundle.files import write_synced
from offsite_fl.bundle.manifest import MANIFEST, is_digest, show
from offsite_fl.errors import BundleError
from offsite_fl.models.head import is_head

FORMAT_VERSION = 1
SUFFIX = ".owner.json"
SAMPLE = 64  # values of each frozen tensor that the fingerprint looks at


@dataclass(frozen=True)
class OwnerMap:
    """What only the owner knows of a bundle.

    ``adapter`` are the full model's indices of the adapter blocks, ``blocks_path`` where its blocks are, ``slots`` map
    every slot name to the full model's state-dict name (emulator slots to the block that they were made from),
    ``emulator`` is the spec text, ``report`` what the emulator report measured, ``split`` the split's text, and
    ``fingerprint`` that of :func:`fingerprint` for the full model.
    """

    digest: str
    blocks_path: str
    adapter: tuple[int, ...]
    slots: Mapping[str, str]
    split: str
    emulator: str
    fingerprint: str
    report: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def path_for(bundle: str | os.PathLike[str]) -> Path:
        """Where the map of the bundle in folder ``bundle`` lies: ``<folder>.owner.json``, beside it."""
        folder = Path(os.path.abspath(bundle))
        return folder.with_name(folder.name + SUFFIX)

    def save(self, bundle: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
        """Write the map for the bundle in folder ``bundle``, readable by the owner only; returns its path.

        ``BundleError`` if ``path`` lies inside a bundle, from where it would leave the house.
        """
        target = Path(path) if path is not None else self.path_for(bundle)
        _refuse_inside(target, Path(bundle))
        data = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2, sort_keys=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_synced(target, data.encode(), mode=0o600)
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OwnerMap:
        """Read a map, given its own path or the folder of its bundle; ``BundleError`` says what is wrong with it."""
        file = cls.path_for(path) if Path(path).is_dir() else Path(path)
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise BundleError(
                f"owner map {file} is missing: only the model owner has it, it is written beside the bundle"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"owner map {file} can't be read: {error}") from error
        return cls(**_checked(raw, f"owner map {file}"))

    def check(self, *, digest: str | None = None, model: Mapping[str, torch.Tensor] | None = None) -> None:
        """Check that the map belongs to the bundle ``digest`` and to the full model with state dict ``model``."""
        if digest is not None and digest != self.digest:
            raise BundleError(f"the owner map is for bundle {self.digest}, not for {digest}")
        inside = tuple(f"{self.blocks_path}.{index}." for index in self.adapter)
        adapter = (*inside, *(path for slot, path in self.slots.items() if is_head(slot)))
        if model is not None and fingerprint(model, adapter) != self.fingerprint:
            raise BundleError(
                "the owner map was made for another full model: names, shapes, dtypes or frozen values of the tensors "
                "differ"
            )


def fingerprint(state: Mapping[str, torch.Tensor], adapter: Sequence[str] = ()) -> str:
    """SHA-256 over names, shapes and dtypes of a state dict, and over the first values of each frozen tensor.

    ``adapter`` are beginnings of the names whose values may change, so that an adapted model is still that model.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if not name.startswith(tuple(adapter)):
            total.update(tensor.flatten()[:SAMPLE].double().cpu().numpy().tobytes())
    return total.hexdigest()


def _refuse_inside(target: Path, bundle: Path) -> None:
    resolved = target.resolve()
    for parent in resolved.parents:
        if parent == bundle.resolve() or (parent / MANIFEST).exists():
            raise BundleError(
                f"owner map {target} would lie inside the bundle {parent} and leave with it; put it outside"
            )


def _checked(raw: Any, where: str) -> dict[str, Any]:
    names = {f.name for f in fields(OwnerMap)}
    if not isinstance(raw, dict) or set(raw) != names | {"format_version"}:
        raise BundleError(f"{where} must be an object with the keys {sorted(names | {'format_version'})}")
    if raw["format_version"] != FORMAT_VERSION:
        raise BundleError(f"{where} has format {show(raw['format_version'])}, this version reads {FORMAT_VERSION}")
    texts = ("blocks_path", "split", "emulator")
    fits = {
        "digest": is_digest(raw["digest"]),
        "fingerprint": is_digest(raw["fingerprint"]),
        "adapter": isinstance(raw["adapter"], list) and all(type(i) is int and i >= 0 for i in raw["adapter"]),
        "slots": isinstance(raw["slots"], dict) and all(isinstance(name, str) for name in raw["slots"].values()),
        "report": isinstance(raw["report"], dict),
        **{name: isinstance(raw[name], str) for name in texts},
    }
    for name, good in fits.items():
        if not good:
            raise BundleError(f"{where}: {name} = {show(raw[name])} isn't what it should be")
    return {name: tuple(raw[name]) if name == "adapter" else raw[name] for name in names}
