"""The reason of an error reply: what went wrong at a site, and not where things lie on its disk."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What is in quotes may have blanks in it. A path that isn't ends at the first blank, comma, semicolon or quote.
_START = r"(?:[A-Za-z]:[\\/]|~?/(?=[^\s/])|\\\\)"
_QUOTED = re.compile(rf"(['\"])({_START}[^'\"\n]*)\1")
_BARE = re.compile(rf"(?<![\w.~/\\:]){_START}[^\s'\",;]*")
FOLDER = "(a path of the site)"


def without_folders(text: str, known: Iterable[str] = ()) -> str:
    """``text`` with :data:`FOLDER` in place of every absolute path; names of files without a folder stay.

    ``known`` are paths that are told even where they have blanks in them; of another bare path with a blank, what comes
    behind the blank stays. A net under messages that name no folder to begin with.

    >>> without_folders("bundle /srv/clinic/cache: shard 3 is short")
    'bundle (a path of the site): shard 3 is short'
    """
    for path in sorted(filter(None, known), key=len, reverse=True):
        text = re.sub(rf"{re.escape(path)}[^\s'\",;]*", _hidden, text)
    return _BARE.sub(_hidden, _QUOTED.sub(FOLDER, text))


def _hidden(found: re.Match[str]) -> str:
    path = found[0].rstrip(":.)")
    return FOLDER + found[0][len(path) :]
