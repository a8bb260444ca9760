"""RoLoRA: the factors B and A are trained in turn, so that every average is exact."""

from __future__ import annotations

from offsite_fl.config import Factors

from .lora_strategy import LoraStrategy


class RoLoRA(LoraStrategy):
    """RoLoRA: B is trained in odd rounds and A in even ones, the other one is fixed (arXiv 2409.02346, 2502.01755).

    In each round all clients hold the same fixed factor, so sum p_i B_i A = (sum p_i B_i) A, and
    sum p_i B A_i = B (sum p_i A_i): both averages are exact, and unlike in FFA-LoRA both factors learn. B comes first,
    because it begins at zero and A would get no gradient. Up travels the trained factor alone.
    """

    def trained(self, server_round: int) -> Factors:
        """B in rounds 1, 3, 5..., A in rounds 2, 4, 6..."""
        return "b" if server_round % 2 else "a"
