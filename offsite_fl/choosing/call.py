"""The call that compares candidates and chooses one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.candidates import DEFAULTS
from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.comparison import Comparison
from offsite_fl.choosing.settings import Settings, default_tune
from offsite_fl.choosing.texts import Sources, name_of, read_texts
from offsite_fl.config import TuneConfig, check
from offsite_fl.data.sources import Source
from offsite_fl.emulators.budget import stored_bytes
from offsite_fl.evaluation.record import versions
from offsite_fl.models.blocks import block_list
from offsite_fl.models.tasks import need_next_token
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
    calibration_tokens: int = 8192,
    held_out_tokens: int = 2048,
    test_tokens: int = 4096,
    progress: bool = False,
    name: str = "",
) -> Choice:
    """Build candidate emulators of one size, measure them side by side, and say which one to hand out.

    The owner's model is read only. Each measured cell is kept in ``out/cells.jsonl``, and what stands there isn't
    measured again, so an interrupted call goes on where it was. :meth:`Choice.write` makes the page and the tables.

    Args:
        calibration: public text: methods work on its beginning, losses and gradients are measured on what follows.
        out: folder of this comparison.
        budget: a share of the middle's bytes (0.4, ``"40%"``) or a size (``"40MB"``).
        candidates: specs, in which ``{keep}`` stands for the budget; None: every method, in its natural forms.
        data: text like that of the data owners (one source or several, pooled); without it nothing is tuned, and the
            choice rests on gradients and losses on public text.
        test: held-out data of the same kind; None keeps a tenth of ``data`` apart.
        tune: how a data owner tunes; None: 16 steps of 8 x 128 tokens with a cosine at 5e-4.
        rates: learning rates to try; each candidate counts at the one that does best by the *emulator's* loss on
            validation text, for that is all that a data owner sees. None given: that of ``tune``.
        full_rates: those of full fine-tuning, which is run if ``full_fine_tuning`` says so.
        seeds: each of building and tuning; several give standard deviations and a firmer judgement.
        scales: factors of the update before the plug-in; the one that does best on public text is reported too.
        calibration_tokens: how much public text a method works on.
        held_out_tokens: how much of what follows is measured on.
        test_tokens: how much of the test data is measured on.
        progress: bars and a line for each cell.
        name: what the page calls the model.
    """
    settings = Settings(
        budget=Budget.parse(budget),
        candidates=tuple(DEFAULTS if candidates is None else candidates),
        tune=tune or default_tune(),
        rates=tuple(rates),
        full_rates=tuple(full_rates),
        full_fine_tuning=full_fine_tuning,
        seeds=tuple(seeds),
        scales=tuple(scales),
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        test_tokens=test_tokens,
    )
    check(not full_fine_tuning or data is not None, "full fine-tuning needs data to tune on: give data too")
    need_next_token(owner.model)  # candidates are compared by that loss
    stack = block_list(owner.model, owner.blocks)
    settings.budget.bytes_of(stored_bytes(stack[i] for i in owner.split.middle(owner.blocks.depth)))
    texts = read_texts(owner.tokenizer, settings, calibration, data, test)
    comparison = Comparison(owner, settings, texts, Path(out), progress)
    about = {"model": name, "split": str(owner.split), **_named(calibration, data, test)}
    return Choice.of(comparison.run(), settings, about=about, versions=versions(), out=Path(out))


def _named(calibration: Source, data: Sources | None, test: Source | None) -> dict[str, str]:
    """The sources as the page names them."""
    named = {"calibration": name_of(calibration)}
    if data is None:
        return named
    several = data if isinstance(data, list | tuple) else [data]
    named["data"] = ", ".join(name_of(source) for source in several)
    return named | {"test": "a tenth of the data" if test is None else name_of(test)}
