"""Ways of federating offsite-tuning on Flower, each a ``flwr.serverapp.strategy.Strategy``."""

from .central import central_evaluation
from .offsite_tuning import OffsiteTuning

__all__ = ["OffsiteTuning", "central_evaluation"]
