"""FlexLoRA: the average of the products, factored again into the run's rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord

from offsite_fl.tuning.lora import A, B
from offsite_fl.wire.records import only_arrays, only_metrics

from .factors import bias, linears, refactored, stacked
from .lora_strategy import LoraStrategy

LOST, BIAS = "lora_lost", "lora_bias"


class FlexLoRA(LoraStrategy):
    """FlexLoRA: averages the products B A and takes them apart again by SVD, for unequal ranks too (arXiv 2402.11505).

    For each linear, with U S V^T the singular value decomposition of sum p_i B_i A_i, the new factors are the first
    ``rank`` components, B = U S and A = V^T. They are exact where the sum has at most the run's rank, and else the
    nearest product of that rank. A site with a smaller ``tune.lora-rank`` in its node config takes the first
    components, which are the largest, and its reply counts as filled up with zeros.

    The train metrics of a round get two figures of its worst linear: ``lora_lost``, the share of the squared norm that
    was cut off, and ``lora_bias``, by how much plain averaging of the factors would have been off
    (:func:`offsite_fl.strategies.factors.bias`).
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's metrics, and factors of the average of the products."""
        replies = list(replies)
        plain, metrics = super().aggregate_train(server_round, replies)
        if plain is None:
            return plain, metrics
        contents = [reply.content for reply in replies if reply.has_content()]
        updates = [{n: torch.from_numpy(a.numpy()) for n, a in only_arrays(c)[1].items()} for c in contents]
        weights = [float(only_metrics(content)[1][self.weighted_by_key]) for content in contents]  # type: ignore[arg-type]
        arrays, lost, biases = dict(plain), 0.0, [0.0]
        for linear in linears(updates[0]):
            rank = updates[0][linear + A].shape[0]
            up, down, cut = refactored(*stacked(updates, weights, linear), rank)
            for ending, factor in ((B, up), (A, down)):
                arrays[linear + ending] = Array(factor.float().contiguous().numpy())
            lost = max(lost, cut)
            biases.append(bias(updates, weights, linear))
        return ArrayRecord(arrays), MetricRecord({**(metrics or {}), LOST: lost, BIAS: max(biases)})
