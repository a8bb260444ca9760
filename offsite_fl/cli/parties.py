"""Opening what a command names: the owner with the bundle it made, and the update that came back for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offsite_fl.errors import UpdateError

if TYPE_CHECKING:
    from pathlib import Path

    from offsite_fl.bundle import Bundle, OwnerMap
    from offsite_fl.owner import ModelOwner
    from offsite_fl.repair import Repair
    from offsite_fl.update import Update


def open_owner(model: str, bundle: Bundle, note: OwnerMap) -> ModelOwner:
    """The owner of ``model`` who handed out ``bundle``, split as the owner's map says."""
    from offsite_fl.models.load import load_model
    from offsite_fl.models.split import Split
    from offsite_fl.owner import ModelOwner

    loaded, processor = load_model(model, bundle.plan.task)
    # Before the split is tried on it: a wrong model should be called that.
    note.check(digest=bundle.digest, model=loaded.state_dict())
    plan = bundle.plan
    owner = ModelOwner(loaded, processor, Split(at=note.adapter), task=plan.task, head=plan.head or "none")
    owner.use_bundle(bundle)
    owner.take_handed_out_head()
    return owner


def read_update(path: Path, bundle: Bundle) -> Update:
    """The update in ``path``, which must have been made for ``bundle``."""
    from offsite_fl.update import Update

    update = Update.load(path)
    if update.digest != bundle.digest:
        raise UpdateError(
            f"update {path} was made for bundle {update.digest[:12]}, {bundle.path} is bundle {bundle.digest[:12]}"
        )
    return update


def read_repair(path: Path | None, bundle: Bundle) -> Repair | None:
    """The repair in ``path``, which must have been made for ``bundle``; None without a path."""
    from offsite_fl.repair import Repair

    if path is None:
        return None
    repair = Repair.load(path)
    if repair.digest != bundle.digest:
        raise UpdateError(
            f"repair {path} was made for bundle {repair.digest[:12]}, {bundle.path} is bundle {bundle.digest[:12]}"
        )
    return repair
