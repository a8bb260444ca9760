"""The call that compares candidates and chooses one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.comparison import Comparison
from offsite_fl.choosing.kinds import CLASSES, TEXT, Kind, kind_of
from offsite_fl.choosing.parts import Parts, Sources, name_of, read_parts
from offsite_fl.choosing.settings import Settings, default_tune
from offsite_fl.config import TuneConfig, check, kebab
from offsite_fl.data.sources import Source
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.errors import ConfigError, ModelError
from offsite_fl.evaluation.record import versions
from offsite_fl.heads import nearest_class_mean_head
from offsite_fl.models.blocks import block_list
from offsite_fl.models.tasks import need_loss
from offsite_fl.owner import ModelOwner


def choose(
    owner: ModelOwner,
    *,
    calibration: Source,
    out: str | Path,
    budget: Budget | float | str = 0.5,
    candidates: Sequence[str] | None = None,
    data: Sources | None = None,
    test: Source | None = None,
    tune: TuneConfig | None = None,
    rates: Sequence[float] = (),
    full_rates: Sequence[float] = (5e-5, 1e-4),
    full_fine_tuning: bool = False,
    seeds: Sequence[int] = (0,),
    scales: Sequence[float] = (1.0,),
    calibration_tokens: int | None = None,
    held_out_tokens: int | None = None,
    test_tokens: int | None = None,
    calibration_examples: int | None = None,
    held_out_examples: int | None = None,
    test_examples: int | None = None,
    head_from: str | None = None,
    repair: bool = False,
    progress: bool = False,
    name: str = "",
) -> Choice:
    """Build candidate emulators of one size, measure them side by side, and say which one to hand out.

    The owner's model is read only. Each measured cell is kept in ``out/cells.jsonl``, and what stands there isn't
    measured again, so an interrupted call goes on where it was. :meth:`Choice.write` makes the page and the tables.

    A classifier, of images or of text, is compared on labelled examples and judged by accuracy. It begins with the
    nearest-class-mean head of the calibration examples (:func:`~offsite_fl.heads.nearest_class_mean_head`), which is so
    its "zero-shot", or with its own; afterwards it has its own again.

    Args:
        calibration: public text: methods work on its beginning, losses and gradients are measured on what follows. For
            a classifier labelled examples, as :meth:`DataOwner.tune` takes them, of each class at least one; they are
            taken by turns from all classes, whatever their order.
        out: folder of this comparison.
        budget: a share of the middle's bytes (0.4, ``"40%"``) or a size (``"40MB"``).
        candidates: specs, in which ``{keep}`` stands for the budget; None: every method, in its natural forms.
        data: text or examples like those of the data owners (one source or several, pooled); without it nothing is
            tuned, and the choice rests on gradients and losses on the public ones.
        test: held-out data of the same kind; None keeps a tenth of ``data`` apart.
        tune: how a data owner tunes; None: 16 steps of 8 examples (of 128 tokens) with a cosine at 5e-4.
        rates: learning rates to try; each candidate counts at the one that does best by the *emulator's* loss on
            validation data, for that is all that a data owner sees. None given: that of ``tune``.
        full_rates: those of full fine-tuning, which is run if ``full_fine_tuning`` says so.
        seeds: each of building and tuning; several give standard deviations and a firmer judgement.
        scales: factors of the update before the plug-in; the one that does best on public data is reported too.
        calibration_tokens: how much public text a method works on (8192); for a classifier it is
            ``calibration_examples`` (256).
        held_out_tokens: how much of what follows is measured on (2048), or ``held_out_examples`` (64).
        test_tokens: how much of the test data is measured on (4096), or ``test_examples`` (400).
        head_from: what a classifier begins with, the means of the ``"calibration"`` examples (None), or the head of
            the ``"model"``.
        repair: measure the plug-in with the repair taken out too (:mod:`offsite_fl.repair`), which the owner finds on
            the calibration data; a candidate is then tuned on twice, and the full model once a seed and rate.
        progress: bars and a line for each cell.
        name: what the page calls the model.
    """
    need_loss(owner.model)
    kind = kind_of(owner.task)
    given = {
        "calibration_tokens": calibration_tokens,
        "held_out_tokens": held_out_tokens,
        "test_tokens": test_tokens,
        "calibration_examples": calibration_examples,
        "held_out_examples": held_out_examples,
        "test_examples": test_examples,
    }
    check(kind is CLASSES or head_from is None, f"head-from is for classifiers, this model is for {owner.task}")
    settings = Settings(
        budget=Budget.parse(budget),
        candidates=tuple(kind.candidates if candidates is None else candidates),
        tune=tune or default_tune(),
        rates=tuple(rates),
        full_rates=tuple(full_rates),
        full_fine_tuning=full_fine_tuning,
        seeds=tuple(seeds),
        scales=tuple(scales),
        kind=kind,
        head_from=head_from or "calibration",
        repair=repair,
        **_fitting(kind, owner.task, given),
    )
    check(not full_fine_tuning or data is not None, "full fine-tuning needs data to tune on: give data too")
    check(not repair or data is not None, "a repair is taken out of what was tuned: give data too")
    stack = block_list(owner.model, owner.blocks)
    settings.budget.bytes_of(stored_bytes(stack[i] for i in owner.split.middle(owner.blocks.depth)))
    parts = read_parts(owner.examples, owner.pad_id, settings, calibration, data, test)
    with _first_head(owner, settings, parts):
        cells = Comparison(owner, settings, parts, Path(out), progress).run()
    about = {"model": name, "split": str(owner.split), **_named(calibration, data, test)}
    leak = parts.leak()
    notes = () if leak is None else (leak,)
    return Choice.of(cells, settings, about=about, versions=versions(), notes=notes, out=Path(out))


def _fitting(kind: Kind, task: str, given: dict[str, int | None]) -> dict[str, int]:
    """The sizes that were given; ``ConfigError`` for one in another unit than the kind's."""
    found = {name: size for name, size in given.items() if size is not None}
    for name in found:
        part, _, unit = name.rpartition("_")
        if unit != kind.unit:
            raise ConfigError(
                f"{kebab(name)} doesn't fit a model for {task}, whose data are counted in {kind.unit}: give "
                f"{kebab(part)}-{kind.unit}"
            )
    return found


@contextmanager
def _first_head(owner: ModelOwner, settings: Settings, parts: Parts) -> Iterator[None]:
    """What a classifier begins with, for the length of a ``with`` block; then it has its own values to the bit."""
    if settings.kind is TEXT or settings.head_from == "model":
        yield
        return
    if not owner.head:
        raise ConfigError("this classifier's head isn't trained, so none is made for it: give head-from = model")
    with owner.plugged_in(owner.adapter()) as model:
        try:
            nearest_class_mean_head(model, parts.batches(parts.calibration), owner.head)
        except ModelError as error:
            raise ModelError(f"{error}; or keep the head that the model has: give head-from = model") from error
        yield


def _named(calibration: Source, data: Sources | None, test: Source | None) -> dict[str, str]:
    """The sources as the page names them."""
    named = {"calibration": name_of(calibration)}
    if data is None:
        return named
    several = data if isinstance(data, list | tuple) else [data]
    named["data"] = ", ".join(name_of(source) for source in several)
    return named | {"test": "a tenth of the data" if test is None else name_of(test)}
