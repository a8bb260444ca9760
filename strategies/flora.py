"""FLoRA: exact averages of LoRA updates by stacking, merged into the adapter after every round."""

from __future__ import annotations

from typing import ClassVar

from .lora_strategy import LoraStrategy


class FLoRA(LoraStrategy):
    """FLoRA: fresh factors each round, merged exactly into the adapter: W + s [p1 B1, ..][A1; ..] (arXiv 2409.05976).

    Down travels the full adapter W, up the factors B_i, A_i that data owner i began afresh on it (A_i random from the
    seed of the round and of the owner, B_i zero). The paper sends the stacked factors down, and each client merges
    them; their product is the sum of the products,

        [p_1 B_1, ..., p_n B_n] [A_1; ...; A_n] = sum p_i B_i A_i,

    so the server merges them here, once, and a client that missed rounds has nothing to catch up with. A reply counts
    as the adapter W + s B_i A_i that it stands for, so the average of the replies is the merged one, without cross
    terms between data owners, and a site of smaller rank fits in. The result is a full adapter, whose change has a rank
    of up to the sum of all ranks of all rounds. ``TuneConfig(lora_fresh=True)`` does the same under other strategies.

    Down go the bytes of the adapter, up those of the factors. The server holds one full adapter for each reply, as in a
    federation without LoRA.
    """

    fresh: ClassVar[bool] = True
