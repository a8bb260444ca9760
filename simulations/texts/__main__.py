"""``python -m simulations.texts [FOLDER]``."""

from __future__ import annotations

import sys

from rich.console import Console

from offsite_fl.errors import DataError
from simulations.texts import (
    books_folder,
    choices_folder,
    fetch,
    kinds_folder,
    quickstart_folder,
    write_book_files,
    write_choice_files,
    write_kind_files,
    write_owner_files,
)


def main(arguments: list[str]) -> int:
    """Fetch the texts if they aren't there; write the data owners' files, into the cache unless a folder is given."""
    console = Console(stderr=True)
    try:
        with console.status("fetching the texts of the demo"):
            folder = fetch()
        console.print(f"texts: {folder}", soft_wrap=True)
        written = list(write_owner_files(arguments[0] if arguments else quickstart_folder()).items())
        if not arguments:
            written += write_book_files(books_folder()).items()
            written += write_choice_files(choices_folder()).items()
            written += write_kind_files(kinds_folder()).items()
        for name, path in written:
            console.print(f"{name}: {path} ({path.stat().st_size:,} bytes)", soft_wrap=True)
    except DataError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
