"""Which emulator to hand out: candidates of one size side by side, and the one that serves the owner best."""

from offsite_fl.choosing.budget import Budget
from offsite_fl.choosing.call import choose
from offsite_fl.choosing.choice import Choice
from offsite_fl.choosing.over_seeds import OverSeeds
from offsite_fl.choosing.results import Cell
from offsite_fl.choosing.standing import Standing

__all__ = ["Budget", "Cell", "Choice", "OverSeeds", "Standing", "choose"]
