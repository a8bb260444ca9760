"""FFA-LoRA: the factor A stays as it was drawn, only B is trained and averaged."""

from __future__ import annotations

from offsite_fl.config import Factors

from .lora_strategy import LoraStrategy


class FFALoRA(LoraStrategy):
    """FFA-LoRA: A stays at its random start for good, B is trained and averaged (arXiv 2403.12313).

    With one A for all, sum p_i B_i A = (sum p_i B_i) A: the average of B gives the average of the products exactly.
    The price is that updates stay in the row space of the first A. Up travels B alone, half of the factors. Noise for
    privacy falls on B alone too, where that of two noisy factors would be multiplied.
    """

    def trained(self, server_round: int) -> Factors:
        """Always B."""
        return "b"
