"""The strip of samples on the page: what each network of the five rows answers to a few items of the test set."""

from __future__ import annotations

from collections.abc import Sequence

from offsite_fl.evaluation.markup import Markup, join, section, tag
from offsite_fl.evaluation.rows import ROW_KEYS, ROW_LABELS
from offsite_fl.evaluation.samples import Sample

# Signs and words beside the colours, for readers who see none of them.
_SIGNS = {True: ("\N{CHECK MARK}", "right"), False: ("\N{MULTIPLICATION X}", "wrong")}


def samples(found: Sequence[Sample]) -> Markup:
    """Pictures side by side with the networks below them, then texts below each other; nothing without samples."""
    if not found:
        return Markup()
    pictures, texts = [one for one in found if one.image], [one for one in found if not one.image]
    about = "Items of the public test set, not picked by the answers. Beside each answer a sign: right or wrong."
    shown = [_strip(pictures)] if pictures else []
    return section("Sample by sample", about, *shown, *([_list(texts)] if texts else []))


def _strip(pictures: Sequence[Sample]) -> Markup:
    """A column for each picture, a line for each network."""
    head = [tag("th", "truth", scope="col")]
    head += [tag("th", join((_picture(one), tag("b", one.truth))), scope="col") for one in pictures]
    lines = [
        tag("tr", join((tag("th", ROW_LABELS[key], scope="row"), *(_answer(one, key) for one in pictures))))
        for key in _rows(pictures)
    ]
    return _card(head, lines, "samples")


def _list(texts: Sequence[Sample]) -> Markup:
    """A line for each text, a column for each network."""
    keys = _rows(texts)
    head = [tag("th", name, scope="col") for name in ("text", "truth", *(ROW_LABELS[key] for key in keys))]
    lines = [
        tag("tr", join((tag("td", one.text), tag("td", tag("b", one.truth)), *(_answer(one, key) for key in keys))))
        for one in texts
    ]
    return _card(head, lines, "samples texts")


def _rows(shown: Sequence[Sample]) -> list[str]:
    """The rows that were asked, in their fixed order."""
    return [key for key in ROW_KEYS if any(key in one.answers for one in shown)]


def _picture(one: Sample) -> Markup:
    # The sample has checked that this is a PNG in base64.
    return tag("img", src=f"data:image/png;base64,{one.image}", alt=f"test image of class {one.truth}")


def _answer(one: Sample, key: str) -> Markup:
    answer = one.answers.get(key)
    if answer is None:
        return tag("td", "-")
    sign, word = _SIGNS[answer == one.truth]
    mark = tag("i", sign, role="img", aria_label=word, title=word)
    return tag("td", join((mark, tag("span", answer))), class_=word)


def _card(head: Sequence[Markup], lines: Sequence[Markup], style: str) -> Markup:
    parts = join((tag("thead", tag("tr", join(head))), tag("tbody", join(lines))))
    return tag("div", tag("div", tag("table", parts, class_=style), class_="scroll"), class_="card")
