"""``python -m simulations.pico``."""

from __future__ import annotations

import sys

from rich.console import Console

from offsite_fl.errors import OffsiteError
from simulations.pico import pico_folder


def main() -> int:
    """Make the model if it isn't in the cache, and print its folder."""
    try:
        print(pico_folder())
    except OffsiteError as error:
        Console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
