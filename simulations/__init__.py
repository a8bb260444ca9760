"""Things people run from the repository root (``python -m simulations.NAME``); not part of the installed package."""
