"""The command line ``offsite-fl``: one small file a command, nothing of the method in it."""

from offsite_fl.cli.app import app, main

__all__ = ["app", "main"]
