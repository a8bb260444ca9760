"""The one question about public text that a site answers: whether one of its own examples is in it.

A model owner who aligns the emulator on public text must not do so on a data owner's text, so a site that holds one of
the public examples says so and takes no part. But the server writes all of the question: the fingerprints, the
tokenizer (it comes with the bundle), the block length and where the loss is. One that asks for blocks of two tokens,
then three, with a guess for each, would read a site's text word by word.

Whatever a site does otherwise with an equal example tells the server too. If it left it out and tuned on the rest, the
reply would be another one than for a set without it, and a server can have the same round tuned twice. If it went on as
if nothing were, the two texts would no longer be known to be disjoint. So the site answers, but once: the first
question is written down before it is answered, and any other one is refused before the data are looked at, with the
same words whatever the data are. The same question again, in the next round or the next run, gets the same answer. What
a server learns about the text is one bit, for as long as the file stays.

Layout in the cache folder: ``public/<hash of the site's name>.json``. It goes by the site and not by run or bundle,
which are the server's to choose. Nothing deletes it but the site's operator, who allows another question that way.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from offsite_fl.bundle import Bundle
from offsite_fl.bundle.files import read_plain, write_synced
from offsite_fl.bundle.locks import Lease
from offsite_fl.config import LossOn, TuneConfig, kebab
from offsite_fl.data.fingerprints import Fingerprints
from offsite_fl.errors import BundleError, OffsiteError, StateError

log = logging.getLogger("offsite_fl.public")

FOLDER = "public"
MAX_BYTES = 10_000


class OtherPublicText(OffsiteError):
    """This site has answered a question about public text, and the server puts another one."""


@dataclass(frozen=True)
class PublicQuestion:
    """All that decides what :func:`~offsite_fl.data.fingerprints.overlap` finds, apart from the site's own data.

    ``public_text`` and ``tokenizer`` are SHA-256 in hex: of the set of fingerprints, and of the tokenizer's files.
    """

    public_text: str
    tokenizer: str
    block_size: int
    loss_on: LossOn

    @classmethod
    def of(cls, public: Fingerprints, bundle: Bundle, tune: TuneConfig) -> PublicQuestion:
        """The question that a message with ``public`` puts to a site that tunes ``bundle`` by ``tune``."""
        files = sorted([entry.file, entry.sha256] for entry in bundle.manifest.files)
        return cls(
            hashlib.sha256(np.unique(public).astype("<u8").tobytes()).hexdigest(),
            hashlib.sha256(json.dumps(files).encode()).hexdigest(),
            tune.block_size,
            tune.loss_on,
        )


def admit(question: PublicQuestion, root: Path, site: str) -> None:
    """Write down the first question that is put to ``site``; ``OtherPublicText`` if this is another one than that.

    ``root`` is the cache's folder. ``StateError`` if the file can't be written or read: then nothing is answered.
    """
    path = root / FOLDER / f"{hashlib.sha256(site.encode()).hexdigest()[:16]}.json"
    try:
        first = _first(path, asdict(question))
    except (OSError, ValueError, BundleError) as error:
        log.error("what the server asked about public text can't be kept in %s: %s", path, error)
        raise StateError(
            "what was asked about public text can't be kept; the reason is in the site's own log"
        ) from error
    odd = [kebab(name) for name, value in asdict(question).items() if first.get(name) != value]
    if odd:
        log.error(
            "the server asks about another public text than the first one: %s differs. Each further one that a site "
            "compares its data with can tell the server more of them. To allow another one, delete %s",
            " and ".join(odd),
            path,
        )
        raise OtherPublicText(
            f"this site compares its data with one public text only, cut in one way; {' and '.join(odd)} of this one "
            "differs from the first. Its operator can allow another one: how is in the site's own log"
        )


def _first(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What is in the file, which is written with what is ``asked`` where it isn't there."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    lease = Lease.take(path.with_suffix(".lock"), exclusive=True)
    try:
        if not os.path.lexists(path):
            write_synced(path, json.dumps(asked, indent=1).encode(), 0o600)
            return asked
        found = json.loads(read_plain(path, MAX_BYTES, "public text"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a table")
        return found
    finally:
        if lease is not None:
            lease.release()
