"""Bringing the emulator that was handed out nearer to the full middle again, on public text (FedBiOT)."""

from offsite_fl.alignment.aligner import Aligner, Diverged, Stepped
from offsite_fl.alignment.options import AlignmentOptions

__all__ = ["Aligner", "AlignmentOptions", "Diverged", "Stepped"]
