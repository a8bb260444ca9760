"""Measurements whose tables stand in docs/: each a module that is run by hand and prints what it found."""
