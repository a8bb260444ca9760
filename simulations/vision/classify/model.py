"""The model owner's classifier: a packaged or given backbone, the task's classes, and a head from a few public rows."""

from __future__ import annotations

from classify.settings import LABEL, Settings
from offsite_fl.models.load import load_classifier
from offsite_fl.models.split import Split
from offsite_fl.owner import ModelOwner


def classifier_owner(settings: Settings) -> ModelOwner:
    """The owner of a classifier of the public rows' classes, whose head answers the class with the nearest mean."""
    main, public = settings.main, settings.data.rows("public")
    model, processor = load_classifier(main.model, main.task, sorted(set(public[LABEL])))
    if main.image_size:
        processor.size = {"shortest_edge": main.image_size}
        processor.crop_size = {"height": main.image_size, "width": main.image_size}
    head = main.head[0] if len(main.head) == 1 and main.head[0] in ("auto", "none") else main.head
    owner = ModelOwner(model, processor, Split.parse(main.split), head=head)
    owner.set_nearest_mean_head(public, block_size=settings.tune.block_size)
    return owner
