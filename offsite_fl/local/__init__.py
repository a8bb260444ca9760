"""What a site does in a round other than plain tuning, and what it keeps between rounds."""

from offsite_fl.local.algorithm import ALGORITHMS, Job, LocalAlgorithm, Outcome, read_algorithm
from offsite_fl.local.ditto import Ditto
from offsite_fl.local.fedper import FedPer
from offsite_fl.local.scaffold import Scaffold
from offsite_fl.local.turn import Turn

__all__ = [
    "ALGORITHMS",
    "Ditto",
    "FedPer",
    "Job",
    "LocalAlgorithm",
    "Outcome",
    "Scaffold",
    "Turn",
    "read_algorithm",
]
