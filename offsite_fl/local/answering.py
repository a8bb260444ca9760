"""What a site tells a server that asks for something that can't be done."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable

from offsite_fl.errors import DataError, OffsiteError
from offsite_fl.wire import names
from offsite_fl.wire.reasons import without_folders

log = logging.getLogger("flwr.offsite")


class BundleMissing(OffsiteError):
    """The bundle that a message is about isn't in this site's cache (any more)."""


class PatchMissing(OffsiteError):
    """The patch of the emulator that a message counts on isn't in this site's cache, or isn't whole there."""


class PublicOverlap(OffsiteError):
    """This site holds an example of the public text that the server aligns the emulator on.

    That it does is one bit, the answer to a question that the server put. :mod:`offsite_fl.local.public_question` sees
    to it that a site answers no second one.
    """


class NoValidation(OffsiteError):
    """This site holds no data back to evaluate on."""


# What is wrong with a site's data is told by line and column, and with the site's own paths: not for the server.
WITHHELD = "this site's data can't be used; the reason is in the site's own log"
HIDDEN = "what went wrong is in the site's own log"

CODES: dict[type[OffsiteError], int] = {
    BundleMissing: names.BUNDLE_MISSING,
    PatchMissing: names.PATCH_MISSING,
    NoValidation: names.NO_VALIDATION,
}


def answering(handler: ClientAppCallable, folders: Callable[[Context], list[str]]) -> ClientAppCallable:
    """Turn errors into error replies, whose reason the server logs.

    Of an error in the site's data only that there is one leaves the site. Our own errors tell what was wrong, without
    this site's ``folders``; of any other, as of code that loads data, the server gets the name of its type.
    """

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except OffsiteError as error:
            code, reason = CODES.get(type(error), names.REFUSED), without_folders(str(error), folders(context))
            if isinstance(error, DataError):
                log.error("this site's data can't be used: %s", error)
                reason = WITHHELD
            elif reason != str(error):
                log.error("the server was told this without the folders: %s", error)
            return Message(Error(code, f"{type(error).__name__}: {reason}"), reply_to=message)
        except Exception as error:  # Flower would send its text, which may hold paths and data
            log.exception("this site couldn't answer")
            return Message(Error(names.REFUSED, f"{type(error).__name__}: {HIDDEN}"), reply_to=message)

    return answer
