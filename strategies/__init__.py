"""Ways of federating offsite-tuning on Flower, each a ``flwr.serverapp.strategy.Strategy``."""

from .central import central_evaluation
from .ditto import Ditto
from .fedbiot import FedBiOT
from .fednova import FedNova
from .fedot import FedOT
from .fedper import FedPer
from .ffa_lora import FFALoRA
from .flexlora import FlexLoRA
from .flora import FLoRA
from .offsite_tuning import OffsiteTuning
from .rolora import RoLoRA
from .scaffold import Scaffold

__all__ = [
    "Ditto",
    "FFALoRA",
    "FLoRA",
    "FedBiOT",
    "FedNova",
    "FedOT",
    "FedPer",
    "FlexLoRA",
    "OffsiteTuning",
    "RoLoRA",
    "Scaffold",
    "central_evaluation",
]
