"""The parts of choose.html below the plot. Each gives nothing where the comparison has nothing to say."""

from __future__ import annotations

import math
from collections.abc import Sequence

from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.over_seeds import OverSeeds, part, shown
from offsite_fl.choosing.standing import Standing, Verdict
from offsite_fl.choosing.table import Column, beside, columns_of, reference_lines
from offsite_fl.evaluation.markup import Markup, definitions, duration, join, plain, safe, section, stacked, table, tag
from offsite_fl.evaluation.rows import significant
from offsite_fl.sizes import human_bytes

CHIPS: dict[Verdict, str] = {
    "protects": "chip good",
    "worse than the full model": "chip good",
    "gives the model away": "chip bad",
    "gap not clear": "chip bad",
    "as good as the full model": "chip bad",
    "over budget": "chip",
    "failed": "chip",
}

# Other tables have these, so that the one of results is narrow enough for the deviations.
ELSEWHERE = {"bytes", "verbatim", "FLOPs", "built in", "norm ratio"}
ELSEWHERE_IF_TUNED = {"cosine", "public loss"}


def _rank(choice: Choice, number: int, standing: Standing) -> Markup:
    return tag("span", f"{number} take" if standing is choice.best else str(number), class_=_take(choice, standing))


def _take(choice: Choice, standing: Standing) -> str | None:
    return "take" if standing is choice.best else None


def results(choice: Choice) -> Markup:
    """What the candidates were compared for, best first, with the references below."""
    elsewhere = ELSEWHERE | (ELSEWHERE_IF_TUNED if choice.tuned else set()) | {c.name for c in beside(choice)}
    columns = [column for column in columns_of(choice) if column.name not in elsewhere]
    kind = choice.settings.kind
    about = f"Losses are {kind.loss.unit} of " + ("the test data." if choice.tuned else f"held-out {kind.public}.")
    if choice.tuned and kind.judged_in is not kind.loss:
        about = f"How many of the test examples are {kind.judged_in.unit}; losses are below."
    about += " Best first: what protects within the budget, then by " + ("plug-in." if choice.tuned else "cosine.")
    return section("Candidates", about, _compared(choice, columns))


def in_loss(choice: Choice) -> Markup:
    """The candidates of a classifier by loss, which they aren't judged in."""
    columns = beside(choice)
    if not columns:
        return Markup()
    about = (
        f"In {choice.settings.kind.loss.unit} of the test data. A new head may be more or less sure than it is right."
    )
    return section("The same in loss", about, _compared(choice, columns))


def _compared(choice: Choice, columns: Sequence[Column]) -> Markup:
    """One line a candidate, and the references below."""
    lines: list[list[object]] = []
    for number, standing in enumerate(choice.standings, start=1):
        chip = tag("span", standing.verdict, class_=CHIPS[standing.verdict])
        cells = [stacked(column.text(standing)) for column in columns]
        lines.append([_rank(choice, number, standing), tag("code", standing.spec), chip, *cells])
    for name, found in reference_lines(choice):
        lines.append(["", name, "", *(stacked(found.get(column.name, "")) for column in columns)])
    heads = ["", "emulator", "verdict", *(column.name for column in columns)]
    return tag("div", table(heads, lines, text_columns=(0, 1, 2)), class_="card")


def _measured(choice: Choice) -> list[tuple[int, Standing]]:
    return [(n, s) for n, s in enumerate(choice.standings, start=1) if s.bytes is not None]


def costs(choice: Choice) -> Markup:
    """Bytes, exposure and what building takes, with the methods' own notes."""
    lines = []
    for number, standing in _measured(choice):
        notes = [tag("span", note, class_="note") for note in standing.notes]
        peak = "-" if standing.peak_bytes is None else human_bytes(standing.peak_bytes)
        lines.append(
            [
                _rank(choice, number, standing),
                join((tag("code", standing.spec), *notes)),
                human_bytes(standing.bytes or 0),
                part(standing.share),
                part(standing.verbatim_share),
                part(standing.flops_share),
                duration(standing.build_seconds or 0.0),
                peak,
                "" if standing.hidden_error is None else significant(standing.hidden_error.mean),
                stacked(shown(standing.public_loss)),
            ]
        )
    if not lines:
        return Markup()
    head = ["", "emulator", "bytes", "of middle", "verbatim", "FLOPs", "built in", "memory", "hidden error"]
    done = table([*head, "public loss"], lines, text_columns=(0, 1))
    about = (
        f"The middle holds {human_bytes(choice.middle_bytes)}. Verbatim: share of the full model's parameters that "
        "leaves unchanged, single rows, columns and entries too. FLOPs: of the emulated middle, forward. Memory: "
        "growth at the peak of building. Hidden "
        f"error and loss: untuned, on held-out {choice.settings.kind.public}, on which the full model has "
        f"{choice.public_loss:.3f}."
    )
    return section("Size, exposure, cost", about, tag("div", done, class_="card"))


def gradients(choice: Choice) -> Markup:
    """Cosines by block as bars."""
    measured = [(number, s) for number, s in _measured(choice) if s.cosine is not None]
    if not measured:
        return Markup()
    blocks = max(len(s.cosine_by_block) for _, s in measured)
    lines = []
    for number, standing in sorted(measured, key=lambda pair: -_finite(pair[1].cosine)):
        values = [_finite(standing.cosine), *standing.cosine_by_block]
        ratio = "" if standing.norm_ratio is None else significant(standing.norm_ratio.mean)
        bars = [_bar(value) for value in values]
        lines.append([_rank(choice, number, standing), tag("code", standing.spec), ratio, *bars])
    heads = ["", "emulator", "norm ratio", "all", *(f"block {i}" for i in range(1, blocks + 1))]
    about = (
        "Cosine of the adapter's gradients on the emulator with those on the full model, on held-out "
        f"{choice.settings.kind.public}: of all tensors together and by adapter block in forward order. At 1 a step on "
        "the emulator goes where one on the "
        "full model would, at 0 it has nothing to do with it. Norm ratio: emulator over full model."
    )
    done = table(heads, lines, text_columns=(0, 1))
    return section("Does the adapter learn what it should?", about, tag("div", done, class_="card"))


def _finite(given: OverSeeds | None) -> float:
    return given.mean if given is not None and math.isfinite(given.mean) else 0.0


def _bar(value: float) -> Markup:
    """A number over a bar that is full at 1; a negative cosine has an empty one."""
    text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
    width = 100 * min(max(value, 0.0), 1.0)
    return join((safe(text), tag("span", tag("i", style=f"width:{width:.1f}%"), class_="meter")))


def seeds(choice: Choice) -> Markup:
    """Plug-in and gap of each seed."""
    seeds = choice.settings.seeds
    if len(seeds) < 2 or not choice.tuned:
        return Markup()
    lines, by = [], choice.settings.kind.judged_in
    for number, standing in enumerate(choice.standings, start=1):
        figures = standing.figures(by)
        if figures.plug_in is None or figures.gap is None:
            continue
        cells = [
            told(by_seed[seed]) if seed in by_seed else "failed"
            for given, told in ((figures.plug_in, by.told), (figures.gap, by.told_step))
            for by_seed in [dict(zip(standing.seeds, given.values, strict=True))]
            for seed in seeds
        ]
        lines.append([_rank(choice, number, standing), tag("code", standing.spec), *cells])
    heads = [f"{what}, seed {seed}" for what in ("plug-in", "gap") for seed in seeds]
    done = table(["", "emulator", *heads], lines, text_columns=(0, 1))
    about = (
        "Each seed divides the calibration data anew, draws what is random in a method, and orders the data. A gap "
        "counts as clear if it is more than two standard errors above 0."
    )
    return section("Seed by seed", about, tag("div", done, class_="card"))


def failed(choice: Choice) -> Markup:
    """Candidates that couldn't be built or tuned, and why."""
    lines = [[tag("code", s.spec), error] for s in choice.standings for error in s.errors]
    if not lines:
        return Markup()
    done = table(["emulator", "why"], lines, text_columns=(0, 1))
    about = "These have no place in the comparison. The same command tries them again."
    return section("Failed", about, tag("div", done, class_="card"))


def made(choice: Choice) -> Markup:
    """Notes, settings and versions."""
    settings = {key.replace("-", " "): plain(value) for key, value in choice.settings_table().items()}
    cards = []
    if choice.notes:
        notes = tag("ul", join(tag("li", note) for note in choice.notes), class_="notes")
        cards.append(tag("div", join((tag("h3", "Notes"), notes)), class_="card wide"))
    parts = join((tag("h3", "Settings"), tag("div", definitions(settings), class_="two")))
    cards.append(tag("div", parts, class_="card wide"))
    if choice.versions:
        parts = join((tag("h3", "Versions"), tag("div", definitions(choice.versions), class_="two")))
        cards.append(tag("div", parts, class_="card wide"))
    return section("How it was made", "", tag("div", join(cards), class_="grid"))


def glossary(choice: Choice) -> Markup:
    """What the words of the page mean."""
    words = [
        "Emulator: the compressed, frozen stand-in for the middle of the model, which data owners get with the "
        "adapter. Plug-in: the full model with an adapter that was tuned on the emulator."
    ]
    if choice.tuned:
        by = choice.settings.kind.judged_in
        words += [
            f"Gap: how far the tuned emulator's {by.name} stays behind the plug-in's. Protects: the gap is clearly "
            "above 0 and the tuned emulator is no better than the untuned full model. Gives the model away: the gap is "
            "there, but the tuned emulator is better than the untuned full model, so data owners hold more than the "
            "owner had.",
            "Of adapter: the plug-in's gain as a share of what the same adapter gains on the uncompressed model in the "
            "same steps. Recovered: as a share of full fine-tuning's gain. The learning rate (lr) is the one that does "
            "best by the emulator's loss on validation data.",
        ]
    if choice.tuned and choice.settings.repair:
        words.append(
            "Less repair: the plug-in without what the adapter learns only to put the emulator right, which the model "
            "owner measures by tuning on the calibration data, on the emulator and on the full model."
        )
    return tag("footer", join(tag("p", text) for text in words))
