"""choose.html: one file that tells which emulator to take and why, and shows all the others beside it."""

from __future__ import annotations

from offsite_fl.choosing import sections
from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.frontier import frontier
from offsite_fl.choosing.over_seeds import OverSeeds, part
from offsite_fl.choosing.standing import Standing
from offsite_fl.choosing.yardstick import Yardstick
from offsite_fl.evaluation import plots
from offsite_fl.evaluation.markup import Markup, count, figure, join, kicker, safe, section, tag, tiles
from offsite_fl.evaluation.page import document
from offsite_fl.sizes import human_bytes

STYLE = """
code { font: .86em/1.45 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
td code { word-break: break-all; } h1 code { font-size: .8em; font-weight: 600; letter-spacing: 0; }
.card table { font-size: .89rem; } table .chip { font-size: .78rem; margin: 0; }
td.free { min-width: 9rem; } td.free:nth-child(2) { min-width: 11rem; }
tr > th:first-child { white-space: nowrap; padding-right: .7rem; }
td .meter { min-width: 3.4rem; margin-top: .2rem; } .meter i { background: var(--plug); min-width: 0; }
.note { display: block; color: var(--muted); font-size: .82rem; }
.take { color: var(--good); font-weight: 650; }
"""


def render_choice(choice: Choice) -> str:
    """The whole page. Parts that a comparison has nothing to say about are left out."""
    plots.require_matplotlib()
    body = join(
        (
            _header(choice),
            _frontiers(choice),
            sections.results(choice),
            sections.in_loss(choice),
            sections.costs(choice),
            sections.gradients(choice),
            sections.seeds(choice),
            sections.failed(choice),
            sections.made(choice),
            sections.glossary(choice),
        )
    )
    title = f"offsite_fl: take {choice.best.spec}" if choice.best else "offsite_fl: no emulator to take"
    return document(title, body, STYLE)


def _header(choice: Choice) -> Markup:
    facts = [choice.about.get("model", ""), f"budget {choice.settings.budget} of the middle"]
    facts += [count(len(choice.standings), "candidate"), count(len(choice.settings.seeds), "seed")]
    if choice.best is None:
        head: Markup = safe("No emulator to take.")
        chip = tag("span", "none", class_="chip bad")
    else:
        head = join((safe("Take "), tag("code", choice.best.spec)))
        chip = tag("span", choice.best.verdict, class_=sections.CHIPS[choice.best.verdict])
    lead = tag("p", join((chip, safe(choice.why))), class_="lead")
    numbers = _tiles(choice, choice.best) if choice.best else Markup()
    return tag("header", join((kicker(facts), tag("h1", head), lead, numbers)))


def _tiles(choice: Choice, best: Standing) -> Markup:
    found = _tuned_tiles(choice, best) if choice.tuned else _untuned_tiles(choice, best)
    size = "" if best.bytes is None else human_bytes(best.bytes)
    left = f"{part(best.verbatim_share)} of the model leaves verbatim"
    found.append(("Bytes", part(best.share), f"of the middle, {size}; {left}"))
    return tiles(found)


def _tuned_tiles(choice: Choice, best: Standing) -> list[tuple[str, str, str]]:
    by = choice.settings.kind.judged_in
    found, against = best.figures(by), choice.references(by)
    zero = "" if against.zero_shot is None else f"; {by.told(against.zero_shot)} untuned"
    full = "" if against.full_fine_tuning is None else f"; {_level(by, against.full_fine_tuning)} with full fine-tuning"
    gained = f"the same adapter reaches {by.level(against.uncompressed)} on the uncompressed model"
    return [
        ("Plug-in", _level(by, found.plug_in), f"{by.unit}{zero}{full}"),
        ("Of the adapter's gain", "-" if found.of_adapter is None else f"{found.of_adapter.mean:.0%}", gained),
        (
            "Gap",
            "-" if found.gap is None else by.told_step(found.gap.mean),
            f"{by.step_unit} that the tuned emulator stays behind the plug-in",
        ),
    ]


def _level(by: Yardstick, given: OverSeeds | None) -> str:
    """Without the deviation."""
    return "-" if given is None else by.told(given.mean)


def _untuned_tiles(choice: Choice, best: Standing) -> list[tuple[str, str, str]]:
    against = f"on {choice.settings.kind.public}; {choice.public_loss:.3f} of the full model"
    return [
        ("Gradient cosine", _mean(best.cosine), "adapter's gradients on the emulator against the full model"),
        ("Emulator's loss", _mean(best.public_loss), against),
    ]


def _mean(given: OverSeeds | None) -> str:
    return "-" if given is None else f"{given.mean:.3f}"


def _frontiers(choice: Choice) -> Markup:
    dots = [s.verbatim_share for s in choice.standings if s.verbatim_share is not None]
    sizes = f" Larger dots leave more of the full model verbatim ({min(dots):.0%} to {max(dots):.0%})." if dots else ""
    bars = " Thin lines: one standard deviation over seeds." if len(choice.settings.seeds) > 1 else ""
    if choice.tuned:
        what = "Up: the plug-in gains more. Right: what data owners keep stays farther behind it."
    else:
        what = "Up: the adapter's gradients are kept better. Right: the untuned emulator gives away less."
    about = f"{what} Numbers are ranks in the tables below.{sizes}{bars}"
    yardsticks = choice.settings.kind.yardsticks if choice.tuned else (choice.settings.kind.judged_in,)
    cards = []
    for by in yardsticks:
        name = "The frontier" if len(yardsticks) == 1 else f"The frontier in {by.name}"
        cards.append(figure(name, about, frontier(choice, by)))
    body = join(cards)
    return section("Gain against protection", "", body) if body else Markup()
