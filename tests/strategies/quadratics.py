"""Sites whose losses are quadratics, tuned by the real local algorithms, so that optima and fixed points are known.

Site i has F_i(x) = a_i / 2 * |x - m_i|^2 over all values of the adapter, and takes ``steps`` exact gradient steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

from offsite_fl.config import TuneConfig
from offsite_fl.local import read_algorithm
from offsite_fl.update import Update
from offsite_fl.wire import names
from offsite_fl.wire.codecs import decode, encode

from .conftest import FIRST

Tensors = dict[str, torch.Tensor]
LR = 0.05


@dataclass
class QuadraticJob:
    """See :class:`offsite_fl.local.Job`."""

    curvature: float
    middle: float
    steps: int
    lr: float
    received: Any
    kept: Any
    codec: str = "fp32"
    settings: TuneConfig = field(default_factory=lambda: TuneConfig(optimizer="sgd"))
    run: TuneConfig = field(default_factory=lambda: TuneConfig(optimizer="sgd"))

    def tuned(
        self, start: Any, *, proximal_mu: float | None = None, towards: Any = None, correction: Any = None
    ) -> Update:
        mu, pull = proximal_mu or 0.0, towards or start
        values = {name: tensor.double() for name, tensor in start.items()}
        for _ in range(self.steps):
            for name, y in values.items():
                gradient = self.curvature * (y - self.middle) + mu * (y - pull[name].double())
                gradient = gradient + (correction[name].double() if correction else 0.0)
                values[name] = y - self.lr * gradient
        metrics = {"lr-sum": self.steps * self.lr, "steps": float(self.steps), "train-loss": self.loss(start)}
        return Update({name: y.float() for name, y in values.items()}, "d" * 64, 1, None, metrics)

    def loss(self, values: Any) -> float:
        return sum(float(self.curvature / 2 * (t.double() - self.middle).square().sum()) for t in values.values())

    def as_read(self, values: Any) -> Tensors:
        like = {name: torch.zeros_like(value) for name, value in values.items()}
        return decode(*encode(values, like, self.codec), like, self.codec)

    def initial(self) -> Tensors:
        return {name: tensor.clone() for name, tensor in FIRST.items()}


class Quadratics:
    """A client for :class:`tests.flower_fakes.FakeGrid`; node configs hold ``curvature``, ``middle`` and ``steps``.

    ``states`` is what sites keep, by (run key, site, round); it outlives the grid, as a disk does.
    """

    def __init__(self, lr: float = LR) -> None:
        self.lr = lr
        self.states: dict[tuple[str, str, int], Any] = {}
        self.messages: list[tuple[str, str, dict[str, Any], list[str]]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        site = str(context.node_config["name"])
        if message.metadata.message_type == "query.bundle":
            held = ConfigRecord({names.HELD: True, names.CLIENT: site})
            return Message(RecordDict({"config": held}), reply_to=message)
        config = next(iter(message.content.config_records.values()))
        key, arrays = next(iter(message.content.array_records.items()))
        self.messages.append((message.metadata.message_type, site, dict(config), list(arrays)))
        algorithm, codec = read_algorithm(config), str(config[names.CODEC])
        like = {name: torch.zeros(tuple(array.shape)) for name, array in arrays.items()}
        state = (str(config.get(names.RUN_KEY)), site, int(config.get(names.STATE_ROUND, 0)))  # type: ignore[arg-type]
        kept = self.states[state] if state[2] else None
        node = context.node_config
        job = QuadraticJob(
            float(node["curvature"]),
            float(node["middle"]),
            int(node["steps"]),
            self.lr,
            decode(arrays, config, like, codec),
            kept,
            codec,
        )
        if message.metadata.message_type == "evaluate":
            found = algorithm.evaluate(job) if algorithm else {"loss": job.loss(job.received)}
            metrics = MetricRecord({**found, names.NUM_EXAMPLES: int(node["examples"])})
            return Message(RecordDict({"metrics": metrics, "config": ConfigRecord({"client": site})}), reply_to=message)
        done = algorithm.tune(job) if algorithm else job.tuned(job.received)
        if algorithm:
            self.states[state[0], site, int(config[names.SERVER_ROUND])] = done.keep  # type: ignore[union-attr,arg-type]
        wired, notes = encode({name: done.tensors[name] for name in arrays if name in done.tensors}, like, codec)
        told = {names.CLIENT: site, **({names.ALGORITHM: algorithm.name} if algorithm else {})}
        measured = {name.replace("-", "_"): value for name, value in done.metrics.items()}
        metrics = MetricRecord({names.NUM_EXAMPLES: int(node["examples"]), **measured})
        content = RecordDict({key: wired, "metrics": metrics, "config": ConfigRecord({**notes, **told})})
        return Message(content, reply_to=message)


def quadratic_sites(
    curvatures: list[float], middles: list[float], steps: list[int], examples: list[int] | None = None, first: int = 50
) -> dict[int, dict[str, Any]]:
    """Node configs of the sites a, b, c..."""
    weights = examples or [1] * len(middles)
    return {
        first + i: {"name": "abcdefgh"[i], "curvature": a, "middle": m, "steps": s, "examples": n}
        for i, (a, m, s, n) in enumerate(zip(curvatures, middles, steps, weights, strict=True))
    }


def far(found: Tensors, value: float) -> float:
    """The largest distance of any value from ``value``."""
    return max(float((tensor - value).abs().max()) for tensor in found.values())
